#!lua
-- Makes a conversation, unless its tenant has as many as it may have.
-- KEYS[1] `fb:conv:<id>`  [2] `fb:tenant:<tenant>:convs`
-- ARGV[1] id  [2] tenant  [3] created (ms)  [4] metadata as JSON  [5] life from now on (s)
-- ARGV[6] most of a tenant
-- Returns 1 | 0: there are as many already; nothing changed.

local now, life_s = now_ms(), tonumber(ARGV[5])
call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if call('ZCARD', KEYS[2]) >= tonumber(ARGV[6]) then
  return 0
end
call('ZADD', KEYS[2], now + life_s * 1000, ARGV[1])
call('EXPIRE', KEYS[2], life_s)
call('HSET', KEYS[1], 'tenant', ARGV[2], 'created_ms', ARGV[3], 'metadata', ARGV[4])
call('EXPIRE', KEYS[1], life_s)
return 1
