-- Of each counter: what is seen, whether something of a large commit was left behind, and a missing permission.
-- ARGV: 'write' (permissions matter) or 'look', then a name per counter.
local writes = take() == 'write'
local found = {}
for place = 1, #ARGV - 1 do
  local keys = keys_of(place)
  local what = writes and denied(keys)
  if what then
    found[place] = { '', 0, what }
  else
    local left = redis.call('EXISTS', keys.staging, keys.staging_value, keys.staging_rows, keys.staging_nonnull)
    found[place] = { observe(keys, take()), left, '' }
  end
end
return found
