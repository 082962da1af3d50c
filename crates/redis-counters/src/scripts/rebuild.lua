-- Asks for a counter's copy, which a builder fills. KEYS: the counter's, then its copy's.
-- ARGV: name, expectation, pipeline, 'keep' or 'remove' (what is shown). A copy that is there stays as it is.
local name = ARGV[1]
local moved, seen = first_moved(1)
if moved then return { moved, seen } end
local place, what = first_denied(2)
if place then return { place, what } end
local pipeline, shown = take(), take()
local keys, copy = keys_of(1), keys_of(2)
if shown == 'remove' then
  redis.call('UNLINK', keys.checkpoint, keys.value, keys.rows, keys.nonnull, keys.staging, keys.staging_value,
    keys.staging_rows, keys.staging_nonnull)
end
redis.call('HSET', keys.owners, name, pipeline)
if type_of(copy.checkpoint) ~= 'hash' then redis.call('UNLINK', copy.checkpoint) end
redis.call('HSETNX', copy.checkpoint, 'state', 'requested')
return { 0, '' }
