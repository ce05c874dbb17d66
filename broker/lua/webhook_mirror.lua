#!lua
-- Changes a field of a copy of the database, unless somebody has changed it meanwhile.
-- KEYS[1] the hash
-- ARGV[1] field  [2] value it had when it was read, or empty  [3] value wanted, or empty: none
-- Returns 1 | 0: it has another value by now

if (call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
if ARGV[3] == '' then
  call('HDEL', KEYS[1], ARGV[1])
else
  call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
return 1
