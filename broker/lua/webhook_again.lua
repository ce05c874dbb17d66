#!lua
-- Sends a delivery once more, with its id and all attempts of the plan.
-- KEYS[1] the delivery
-- ARGV[1] delivery id  [2] tenant that must own it  [3] bound of a group's deliveries at once
-- Returns 1 | -1: no such delivery

local raw = call('HMGET', KEYS[1], 'tenant', 'group')
if raw[1] ~= ARGV[2] then
  return -1
end
if not call('ZSCORE', LEASES, ARGV[1]) then
  local now = now_ms()
  call('PERSIST', KEYS[1])
  call('HSET', KEYS[1], 'state', 'pending', 'failures', 0, 'next_ms', now, 'ended_ms', 0)
  wait_until(ARGV[1], raw[2], now, tonumber(ARGV[3]))
  ring_webhooks()
end
return 1
