-- Begins a large commit of one counter, or carries it on: the new value is built beside the live one. A token
-- says whose it is, so that two workers never build into the same keys.
-- ARGV: 'begin', token, 'copy' or 'empty', name, expectation
--   or: 'more', token, then the counted lists of commit.lua's 'patch' for a hash.
local step, token = take(), take()
local keys = keys_of(1)
if step == 'begin' then
  local copy = take() == 'copy'
  local moved, seen = first_moved(1)
  if moved then return { 1, seen } end
  local place, what = first_denied(1)
  if place then return { place, what } end
  redis.call('UNLINK', keys.staging_value, keys.staging_rows, keys.staging_nonnull)
  redis.call('SET', keys.staging, token)
  if copy then
    -- COPY of a key that is not there does nothing.
    redis.call('COPY', keys.value, keys.staging_value)
    redis.call('COPY', keys.rows, keys.staging_rows)
    redis.call('COPY', keys.nonnull, keys.staging_nonnull)
  end
  return { 0, '' }
end
if redis.call('GET', keys.staging) ~= token then return { 1, 'staged by another worker' } end
write('HSET', keys.staging_value, tonumber(take()))
write_hidden(keys.staging_value, keys.staging_rows, keys.staging_nonnull)
return { 0, '' }
