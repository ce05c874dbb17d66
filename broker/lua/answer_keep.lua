#!lua
-- Keeps an answer and gives up the claim to it; the tenant's oldest go where there are too many.
-- KEYS[1] answer  [2] claim to it  [3] the tenant's answers
-- ARGV[1] who has the claim  [2] the answer  [3] its life (ms)  [4] most answers of a tenant
-- Returns how many answers had to go.

if call('GET', KEYS[2]) == ARGV[1] then
  call('DEL', KEYS[2])
end
local now = now_ms()
call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
call('ZADD', KEYS[3], now + ARGV[3], KEYS[1])
call('PEXPIRE', KEYS[3], ARGV[3])
local over = call('ZCARD', KEYS[3]) - ARGV[4]
if over <= 0 then
  return 0
end
local oldest = call('ZPOPMIN', KEYS[3], over)
for i = 1, #oldest, 2 do
  call('UNLINK', oldest[i])
end
return over
