#!lua
-- Changes a field of a copy of the database, unless somebody has changed it meanwhile.
-- KEYS[1] the hash  [2] the set of tenants with endpoints
-- ARGV[1] field  [2] value it had when it was read, or empty  [3] value wanted, or empty: none
-- ARGV[4] tenant whose endpoints these are, or empty
-- Returns 1 | 0: it has another value by now

if (call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
if ARGV[3] == '' then
  call('HDEL', KEYS[1], ARGV[1])
else
  call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
if ARGV[4] ~= '' then
  call(call('EXISTS', KEYS[1]) == 1 and 'SADD' or 'SREM', KEYS[2], ARGV[4])
end
return 1
