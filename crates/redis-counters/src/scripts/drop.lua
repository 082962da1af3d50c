-- Removes counters that this pipeline owns. ARGV: pipeline, then a name per counter. Returns how many there were.
local pipeline = take()
local dropped = 0
for place = 1, #ARGV - 1 do
  local name = take()
  local keys = keys_of(place)
  local ours = type_of(keys.owners) == 'hash' and redis.call('HGET', keys.owners, name) == pipeline
  if ours or type_of(keys.checkpoint) == 'hash' then
    redis.call('UNLINK', keys.checkpoint, keys.value, keys.rows, keys.nonnull, keys.staging, keys.staging_value,
      keys.staging_rows, keys.staging_nonnull)
    if ours then redis.call('HDEL', keys.owners, name) end
    dropped = dropped + 1
  end
end
return dropped
