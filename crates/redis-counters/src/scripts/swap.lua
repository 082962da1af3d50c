-- Puts a counter's copy in its place: value, hidden counts and checkpoint, all or nothing, and only if readers do not
-- go back by it (h42). KEYS: the copy's, then the counter's. ARGV: name, expectation of the copy.
local moved, seen = first_moved(1)
if moved then return { moved, seen } end
local copy, keys = keys_of(1), keys_of(2)

-- Where a checkpoint stands; nothing if it does not say.
local function place_of(key)
  if type_of(key) ~= 'hash' then return end
  local log, generation, offset, lsn = unpack(redis.call('HMGET', key, 'log', 'generation', 'offset', 'lsn'))
  local high, low = string.match(lsn or '', '^(%x+)/(%x+)$')
  offset = tonumber(offset or nil)
  if not (log and generation and offset and high) then return end
  return { log = log .. '/' .. generation, offset = offset, high = tonumber(high, 16), low = tonumber(low, 16) }
end

local fresh, shown = place_of(copy.checkpoint), place_of(keys.checkpoint)
if not fresh then return { 1, 'its copy has no place' } end
if shown then
  local older = fresh.high < shown.high or (fresh.high == shown.high and fresh.low < shown.low)
  if older or (fresh.log == shown.log and fresh.offset < shown.offset) then return { 2, 'it stands further on' } end
end
local place, what = first_denied(2)
if place then return { place, what } end
for _, part in ipairs({ 'value', 'rows', 'nonnull', 'checkpoint' }) do
  redis.call('UNLINK', keys[part])
  -- A counter without groups has no value, and RENAME fails without one.
  if redis.call('EXISTS', copy[part]) == 1 then redis.call('RENAME', copy[part], keys[part]) end
end
for _, gone in ipairs({ copy, keys }) do
  redis.call('UNLINK', gone.staging, gone.staging_value, gone.staging_rows, gone.staging_nonnull)
end
return { 0, '' }
