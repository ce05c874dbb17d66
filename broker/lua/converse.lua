#!lua
-- Adds items to a conversation; settles the response that it waits for.
-- KEYS[1] `fb:conv:<id>`  [2] `fb:conv:<id>:items`; also `fb:tenant:<tenant>:convs` of its owner
-- ARGV[1] job it must be waiting for, or empty  [2] life from now on (s)
-- ARGV[3…] id and JSON of each item
-- Returns 1 | 0: it is gone, or doesn't wait for that job (any more); nothing changed.

local tenant = call('HGET', KEYS[1], 'tenant')
if not tenant then
  -- It expired, and a field written just after that is no conversation.
  call('DEL', KEYS[1])
  return 0
end
if ARGV[1] ~= '' then
  if call('HGET', KEYS[1], 'pending') ~= ARGV[1] then
    return 0
  end
  call('HDEL', KEYS[1], 'pending')
end
for k = 3, #ARGV, 2 do
  local place = call('HINCRBY', KEYS[1], 'places', 1)
  call('HSET', KEYS[2], ARGV[k], place .. '|' .. ARGV[k + 1])
end
call('EXPIRE', KEYS[1], ARGV[2])
call('EXPIRE', KEYS[2], ARGV[2])
local kept = 'fb:tenant:' .. tenant .. ':convs'
call('ZADD', kept, now_ms() + ARGV[2] * 1000, string.sub(KEYS[1], #'fb:conv:' + 1))
call('EXPIRE', kept, ARGV[2])
return 1
