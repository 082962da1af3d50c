-- Builds the new value of a counter beside the live one, in pieces: first a copy of what is there, then the changes.
-- The live one cannot change meanwhile without a new checkpoint, which commit.lua compares before it swaps. The token
-- says who builds, so that two workers never build into the same keys.
-- ARGV: step, token, then
--   'begin': name, expectation
--   'copy': name, expectation, which hash (1 value, 2 rows, 3 nonnull), cursor, about how many fields.
--     Returns the next cursor, '0' after the last piece.
--   'more': the counted lists of commit.lua's 'patch' for a hash.
local step, token = take(), take()
local keys = keys_of(1)
if step == 'begin' then
  local moved, seen = first_moved(1)
  if moved then return { 1, seen } end
  local place, what = first_denied(1)
  if place then return { place, what } end
  redis.call('UNLINK', keys.staging_value, keys.staging_rows, keys.staging_nonnull)
  redis.call('SET', keys.staging, token)
  return { 0, '' }
end
if redis.call('GET', keys.staging) ~= token then return { 1, 'staged by another worker' } end
if step == 'copy' then
  local moved, seen = first_moved(1)
  if moved then return { 1, seen } end
  local which, cursor, count = tonumber(take()), take(), take()
  local from = ({ keys.value, keys.rows, keys.nonnull })[which]
  local to = ({ keys.staging_value, keys.staging_rows, keys.staging_nonnull })[which]
  local found = redis.call('HSCAN', from, cursor, 'COUNT', count)
  write_all('HSET', to, found[2])
  return { 0, found[1] }
end
write('HSET', keys.staging_value, tonumber(take()))
write_hidden(keys.staging_value, keys.staging_rows, keys.staging_nonnull)
return { 0, '' }
