-- Current value and hidden counts of some groups, as of the expected checkpoints.
-- ARGV: number of counters; name and expectation of each; of each the token under which it is staged or torn, or '', and
-- what to read: its value as a hash ('h') or a string ('s'), or what is staged ('b'); the number of groups, and the groups.
local count = tonumber(take())
local moved, seen = first_moved(count)
if moved then return { moved, seen, {} } end

local function fetch(into, key, first, last)
  if redis.call('EXISTS', key) == 0 then return end
  local place = first
  while place <= last do
    local stop = math.min(place + UNPACKED - 1, last)
    for _, value in ipairs(redis.call('HMGET', key, unpack(ARGV, place, stop))) do
      into[#into + 1] = value
    end
    place = stop + 1
  end
end

local found = {}
for place = 1, count do
  local keys = keys_of(place)
  local token, kind, groups = take(), take(), tonumber(take())
  if token ~= '' and redis.call('GET', keys.staging) ~= token then
    return { place, 'changed by another worker', {} }
  end
  local first, last = at + 1, at + groups
  at = last
  local values, rows, nonnull = {}, {}, {}
  local from = { keys.value, keys.rows, keys.nonnull }
  if kind == 'b' then from = { keys.staging_value, keys.staging_rows, keys.staging_nonnull } end
  if kind == 's' then
    values[1] = redis.call('GET', from[1])
  else
    fetch(values, from[1], first, last)
  end
  fetch(rows, from[2], first, last)
  fetch(nonnull, from[3], first, last)
  found[place] = { values, rows, nonnull }
end
return { 0, '', found }
