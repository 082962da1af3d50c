-- What every script shares: nine keys per counter (keys.rs), and what is seen of a counter as one text, which
-- Rust reads and writes in the same form (observation.rs).
local KEYS_PER_COUNTER = 9
-- unpack fails near 8000 values.
local UNPACKED = 4000

local at = 0
local function take()
  at = at + 1
  return ARGV[at]
end

local function type_of(key)
  return redis.call('TYPE', key).ok
end

local function length_of(key, kind)
  if kind == 'hash' then return redis.call('HLEN', key) end
  if kind == 'none' then return 0 end
  return 1
end

local function keys_of(place)
  local first = (place - 1) * KEYS_PER_COUNTER
  return {
    owners = KEYS[first + 1],
    checkpoint = KEYS[first + 2],
    value = KEYS[first + 3],
    rows = KEYS[first + 4],
    nonnull = KEYS[first + 5],
    staging = KEYS[first + 6],
    staging_value = KEYS[first + 7],
    staging_rows = KEYS[first + 8],
    staging_nonnull = KEYS[first + 9],
  }
end

local FIELDS = { 'format', 'log', 'generation', 'offset', 'lsn', 'definition', 'groups', 'state', 'skipped', 'last',
  'stopped' }

local function observe(keys, name)
  local seen = {}
  local function see(value)
    seen[#seen + 1] = tostring(value or '')
  end
  local owners = type_of(keys.owners)
  -- That others' entries come and go is not this counter's affair.
  see(owners == 'none' and 'hash' or owners)
  see(owners == 'hash' and redis.call('HGET', keys.owners, name))
  local checkpoint = type_of(keys.checkpoint)
  see(checkpoint)
  local fields = checkpoint == 'hash' and redis.call('HMGET', keys.checkpoint, unpack(FIELDS)) or {}
  for place = 1, #FIELDS do
    see(fields[place])
  end
  for _, key in ipairs({ keys.value, keys.rows, keys.nonnull }) do
    local kind = type_of(key)
    see(kind)
    see(length_of(key, kind))
  end
  return table.concat(seen, '\n')
end

-- Commands and keys that the user may not use. Asked before the first write, so that none fails after it; a server
-- older than 7.0 cannot tell.
local function denied(keys)
  if not redis.acl_check_cmd then return end
  local function ask(...)
    if not redis.acl_check_cmd(...) then return table.concat({ ... }, ' ', 1, 2) end
  end
  local found = ask('HGET', keys.owners, 'f') or ask('HSET', keys.owners, 'f', 'v')
    or ask('SET', keys.value, 'v') or ask('GET', keys.value)
  for _, key in ipairs({ 'checkpoint', 'value', 'rows', 'nonnull', 'staging_value' }) do
    key = keys[key]
    found = found or ask('HSET', key, 'f', 'v') or ask('HMGET', key, 'f') or ask('HDEL', key, 'f') or ask('UNLINK', key)
      or ask('TYPE', key) or ask('HLEN', key) or ask('EXISTS', key)
  end
  return found or ask('SET', keys.staging, 'v') or ask('GET', keys.staging)
    or ask('RENAME', keys.staging_value, keys.value) or ask('HSCAN', keys.value, '0')
    or ask('HSETNX', keys.staging_value, 'f', 'v')
end

-- Why the first `count` counters cannot be written, if so: a place below zero for a missing permission.
local function first_denied(count)
  for place = 1, count do
    local what = denied(keys_of(place))
    if what then return -place, what end
  end
end

-- The first `count` counters that are not as expected, by name and expectation in ARGV: its place and what is seen.
local function first_moved(count)
  for place = 1, count do
    local name, expected = take(), take()
    local seen = observe(keys_of(place), name)
    if seen ~= expected then return place, seen end
  end
end

local function write(command, key, count)
  while count > 0 do
    local now = math.min(count, UNPACKED)
    redis.call(command, key, unpack(ARGV, at + 1, at + now))
    at = at + now
    count = count - now
  end
end

-- The same for a list.
local function write_all(command, key, list)
  for first = 1, #list, UNPACKED do
    redis.call(command, key, unpack(list, first, math.min(first + UNPACKED - 1, #list)))
  end
end

-- Counted lists: hidden counts to set, then groups to delete everywhere.
local function write_hidden(value, rows, nonnull)
  write('HSET', rows, tonumber(take()))
  write('HSET', nonnull, tonumber(take()))
  local gone = tonumber(take())
  local first = at
  for _, key in ipairs({ value, rows, nonnull }) do
    at = first
    write('HDEL', key, gone)
  end
end
