-- Current value and hidden counts of some groups, as of the expected checkpoints.
-- ARGV: number of counters; name and expectation of each; of each whether its value is a hash ('h') or a
-- string ('s'), the number of groups, and the groups.
local count = tonumber(take())
local moved, seen = first_moved(count)
if moved then return { moved, seen, {} } end

local function fetch(into, key, first, last)
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
  local kind, groups = take(), tonumber(take())
  local first, last = at + 1, at + groups
  at = last
  local values, rows, nonnull = {}, {}, {}
  if kind == 's' then
    values[1] = redis.call('GET', keys.value)
  else
    fetch(values, keys.value, first, last)
  end
  fetch(rows, keys.rows, first, last)
  fetch(nonnull, keys.nonnull, first, last)
  found[place] = { values, rows, nonnull }
end
return { 0, '', found }
