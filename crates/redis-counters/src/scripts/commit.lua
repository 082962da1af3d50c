-- Moves counters, all or nothing: every expectation is checked before the first write, and no write after that
-- can fail by a key's type (h41). Values are absolute.
-- ARGV: number of counters; name and expectation of each; of each the token under which it was staged or torn, or '',
--   and the number of groups that it staged, or ''; then per
-- counter:
--   how: 'patch' (change fields), 'replace' (forget all first), 'swap' (put the staged keys in place) or 'finish' (a torn
--   counter is whole);
--   for 'patch' and 'replace': kind of the value ('h' or 's'), then four counted lists: value, rows and nonnull to set
--   (field, content, ...; for 's' the content only), groups to delete;
--   a counted list of checkpoint fields.
local count = tonumber(take())
local moved, seen = first_moved(count)
if moved then return { moved, seen } end
for place = 1, count do
  local token, groups = take(), take()
  local keys = keys_of(place)
  if token ~= '' then
    if redis.call('GET', keys.staging) ~= token then return { place, 'staged by another worker' } end
    if groups ~= '' and redis.call('HLEN', keys.staging_value) ~= tonumber(groups) then return { place, 'its staging copy is damaged' } end
  end
end

local place, what = first_denied(count)
if place then return { place, what } end

local function swap(from, to)
  redis.call('UNLINK', to)
  if redis.call('EXISTS', from) == 1 then redis.call('RENAME', from, to) end
end

local function patch(keys)
  local kind = take()
  local values = tonumber(take())
  if kind == 's' then
    if values == 1 then redis.call('SET', keys.value, take()) end
  else
    write('HSET', keys.value, values)
  end
  write_hidden(keys.value, keys.rows, keys.nonnull)
end

for place = 1, count do
  local keys = keys_of(place)
  local how = take()
  if how == 'swap' then
    swap(keys.staging_value, keys.value)
    swap(keys.staging_rows, keys.rows)
    swap(keys.staging_nonnull, keys.nonnull)
    redis.call('UNLINK', keys.staging)
  elseif how == 'finish' then
    redis.call('UNLINK', keys.staging, keys.staging_value)
  else
    if how == 'replace' then redis.call('UNLINK', keys.value, keys.rows, keys.nonnull) end
    patch(keys)
  end
  write('HSET', keys.checkpoint, tonumber(take()))
end
return { 0, '' }
