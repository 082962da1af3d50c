-- A part of a counter's value, and what is seen of the counter at that moment.
-- ARGV: name, then
--   'scan', cursor, about how many groups: groups and values in turn; the next cursor, '0' after the last part.
--   'groups', then groups: the value of each. Without GROUP BY the value is that of the group ''.
local name, step = take(), take()
local keys = keys_of(1)
local kind = type_of(keys.value)
local cursor, content = '0', {}
if step == 'scan' then
  if kind == 'hash' then
    local found = redis.call('HSCAN', keys.value, take(), 'COUNT', take())
    cursor, content = found[1], found[2]
  elseif kind == 'string' then
    content = { '', redis.call('GET', keys.value) }
  end
else
  for place = 1, #ARGV - at do
    local group = take()
    local value = false
    if kind == 'hash' then
      value = redis.call('HGET', keys.value, group)
    elseif kind == 'string' and group == '' then
      value = redis.call('GET', keys.value)
    end
    content[place] = value
  end
end
return { observe(keys, name), cursor, content }
