-- Moves counters, all or nothing: every expectation is checked before the first write, and no write after that
-- can fail by a key's type (h41). Values are absolute.
-- ARGV: number of counters; name and expectation of each; of each the token it staged under and the
--   number of groups it staged, or '' and 0; then per
-- counter:
--   how: 'patch' (change fields), 'replace' (forget all first) or 'swap' (put the staged keys in place);
--   unless 'swap': kind of the value ('h' or 's'), then four counted lists: value, rows and nonnull to set
--   (field, content, ...; for 's' the content only), groups to delete;
--   a counted list of checkpoint fields.
local count = tonumber(take())
local moved, seen = first_moved(count)
if moved then return { moved, seen } end
for place = 1, count do
  local token, groups = take(), tonumber(take())
  local keys = keys_of(place)
  if token ~= '' then
    if redis.call('GET', keys.staging) ~= token then return { place, 'staged by another worker' } end
    if redis.call('HLEN', keys.staging_value) ~= groups then return { place, 'its staging copy is damaged' } end
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
  else
    if how == 'replace' then redis.call('UNLINK', keys.value, keys.rows, keys.nonnull) end
    patch(keys)
  end
  write('HSET', keys.checkpoint, tonumber(take()))
end
return { 0, '' }
