#!lua
-- Makes a conversation, unless its tenant has as many as it may have.
-- KEYS[1] `fb:conv:<id>`  [2] `fb:tenant:<tenant>:convs`  [3] `fb:conv:<id>:items`
-- ARGV[1] id  [2] tenant  [3] created (ms)  [4] metadata as JSON  [5] life from now on (s)
-- ARGV[6] most of a tenant
-- ARGV[7] key of the idempotency entry, or empty  [8] digest of the request  [9] life of the entry
-- ARGV[10…] id and JSON of each item
-- Returns {1, id} | {1, id of the one that was made for the same request before}
-- | {0}: there are as many already | {2, id}: the idempotency key belongs to another request.

local now, life_s = now_ms(), tonumber(ARGV[5])
if ARGV[7] ~= '' then
  local known = call('GET', ARGV[7])
  if known then
    local request, first = string.match(known, '^(%x+)|(.*)$')
    return {request == ARGV[8] and 1 or 2, first}
  end
end
call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if call('ZCARD', KEYS[2]) >= tonumber(ARGV[6]) then
  return {0}
end
if ARGV[7] ~= '' then
  call('SET', ARGV[7], ARGV[8] .. '|' .. ARGV[1], 'PX', ARGV[9])
end
call('ZADD', KEYS[2], now + life_s * 1000, ARGV[1])
call('EXPIRE', KEYS[2], life_s)
call('HSET', KEYS[1], 'tenant', ARGV[2], 'created_ms', ARGV[3], 'metadata', ARGV[4])
local places = 0
for k = 10, #ARGV, 2 do
  places = places + 1
  call('HSET', KEYS[3], ARGV[k], places .. '|' .. ARGV[k + 1])
end
if places > 0 then
  call('HSET', KEYS[1], 'places', places)
  call('EXPIRE', KEYS[3], life_s)
end
call('EXPIRE', KEYS[1], life_s)
return {1, ARGV[1]}
