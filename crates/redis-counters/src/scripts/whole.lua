-- A counter's whole value and what is seen of it, at one moment. ARGV: name.
local keys = keys_of(1)
local kind = type_of(keys.value)
local content = {}
if kind == 'hash' then content = redis.call('HGETALL', keys.value) end
if kind == 'string' then content = { '', redis.call('GET', keys.value) } end
return { observe(keys, ARGV[1]), content }
