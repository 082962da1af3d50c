-- Changes a counter that nobody reads in place, in pieces. Until commit.lua finishes, its checkpoint says 'torn', and
-- what each changed group was is kept under the staging keys, so that all of it can be taken back.
-- ARGV: step, token, then
--   'begin': name, expectation, the checkpoint's state from here on
--   'more': name, expectation, 'once' if no group can have been changed since 'begin', else 'again'; a counted list of
--     groups and what they were (large.rs); then the counted lists of commit.lua's 'patch' for a hash.
--   'undo': name, expectation. Takes the counter from whoever tore it.
--   'back': cursor, about how many groups. Returns the next cursor, '0' after the last piece.
--   'undone': the checkpoint's state from here on.
local step, token = take(), take()
local keys = keys_of(1)
if step == 'begin' or step == 'undo' then
  local moved, seen = first_moved(1)
  if moved then return { 1, seen } end
  local place, what = first_denied(1)
  if place then return { place, what } end
  redis.call('SET', keys.staging, token)
  if step == 'begin' then
    redis.call('UNLINK', keys.staging_value, keys.staging_rows, keys.staging_nonnull)
    redis.call('HSET', keys.checkpoint, 'state', take())
  end
  return { 0, '' }
end
if redis.call('GET', keys.staging) ~= token then return { 1, 'changed by another worker' } end
if step == 'more' then
  local moved, seen = first_moved(1)
  if moved then return { 1, seen } end
  if take() == 'once' then
    write('HSET', keys.staging_value, tonumber(take()))
  else
    for _ = 1, tonumber(take()) / 2 do
      -- What the group was before the first of its changes.
      redis.call('HSETNX', keys.staging_value, take(), take())
    end
  end
  write('HSET', keys.value, tonumber(take()))
  write_hidden(keys.value, keys.rows, keys.nonnull)
  return { 0, '' }
end
if step == 'undone' then
  redis.call('HSET', keys.checkpoint, 'state', take())
  redis.call('UNLINK', keys.staging, keys.staging_value)
  return { 0, '' }
end
local cursor, count = take(), take()
local found = redis.call('HSCAN', keys.staging_value, cursor, 'COUNT', count)
local live = { keys.value, keys.rows, keys.nonnull }
local set, gone = { {}, {}, {} }, { {}, {}, {} }
for place = 1, #found[2], 2 do
  local group = found[2][place]
  local which = 0
  for part in string.gmatch(found[2][place + 1] .. '\n', '([^\n]*)\n') do
    which = which + 1
    if part == '' then
      table.insert(gone[which], group)
    else
      table.insert(set[which], group)
      table.insert(set[which], string.sub(part, 2))
    end
  end
end
for which = 1, 3 do
  write_all('HSET', live[which], set[which])
  write_all('HDEL', live[which], gone[which])
end
return { 0, found[1] }
