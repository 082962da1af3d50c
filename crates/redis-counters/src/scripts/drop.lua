-- Removes counters that this pipeline owns, with their copies. KEYS: each counter's, then its copy's.
-- ARGV: pipeline, then a name per counter. Returns how many there were.
local pipeline = take()
local dropped = 0
for place = 1, #ARGV - 1 do
  local name = take()
  local keys = keys_of(2 * place - 1)
  local ours = type_of(keys.owners) == 'hash' and redis.call('HGET', keys.owners, name) == pipeline
  if ours or type_of(keys.checkpoint) == 'hash' then
    for _, gone in ipairs({ keys, keys_of(2 * place) }) do
      redis.call('UNLINK', gone.checkpoint, gone.value, gone.rows, gone.nonnull, gone.staging, gone.staging_value,
        gone.staging_rows, gone.staging_nonnull)
    end
    if ours then redis.call('HDEL', keys.owners, name) end
    dropped = dropped + 1
  end
end
return dropped
