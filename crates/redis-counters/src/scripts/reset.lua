-- Empties a counter that is as expected and gives it a checkpoint.
-- ARGV: name, expectation, pipeline, then counted lists: [initial value of a string], [field, content of nonnull],
-- checkpoint fields.
local name = ARGV[1]
local moved, seen = first_moved(1)
if moved then return { moved, seen } end
local place, what = first_denied(1)
if place then return { place, what } end
local keys = keys_of(1)
local pipeline = take()
redis.call('UNLINK', keys.checkpoint, keys.value, keys.rows, keys.nonnull, keys.staging, keys.staging_value,
  keys.staging_rows, keys.staging_nonnull)
redis.call('HSET', keys.owners, name, pipeline)
if tonumber(take()) == 1 then redis.call('SET', keys.value, take()) end
write('HSET', keys.nonnull, tonumber(take()))
write('HSET', keys.checkpoint, tonumber(take()))
return { 0, '' }
