#!lua flags=allow-oom
-- Writes down how an attempt ended; fenced by the attempt.
-- KEYS[1] the delivery
-- ARGV[1] delivery id  [2] attempt  [3] delivered | failed | pending (to be tried again)
-- ARGV[4] ms until the next attempt  [5] life of an ended delivery (s)  [6] bound of a group at once
-- ARGV[7] endpoint whose health this tells of, or empty  [8] 1: it is gone, else 0
-- ARGV[9] ms of failing after which an endpoint is disabled
-- ARGV[10…] further fields and values
-- Returns 1 | 2: and the endpoint was disabled with this | 0: stale, nothing changed

local id, state = ARGV[1], ARGV[3]
local raw = call('HMGET', KEYS[1], 'group', 'tenant', 'attempt', 'failures')
if not raw[1] or tonumber(raw[3]) ~= tonumber(ARGV[2]) or not call('ZSCORE', LEASES, id) then
  return 0
end
local group, tenant, now = raw[1], raw[2], now_ms()
end_lease(id, group, tenant)
local due = state == 'pending' and now + tonumber(ARGV[4]) or 0
call('HSET', KEYS[1], 'state', state, 'next_ms', due, 'ended_ms', state == 'pending' and 0 or now,
  'failures', tonumber(raw[4]) + (state == 'delivered' and 0 or 1), unpack(ARGV, 10))
if state == 'pending' then
  wait_until(id, group, due, tonumber(ARGV[6]))
else
  call('EXPIRE', KEYS[1], ARGV[5])
  place(group, tonumber(ARGV[6]), now)
end
-- A place is free: what waited for it needn't wait for the next look.
if call('ZRANGEBYSCORE', RING, '-inf', now, 'LIMIT', 0, 1)[1] then
  ring_webhooks()
end
if ARGV[7] == '' then
  return 1
end
local health = 'fb:webhook:health:' .. ARGV[7]
if state == 'delivered' then
  call('HDEL', health, 'failing_ms')
  call('HSET', health, 'succeeded_ms', now)
  return 1
end
call('HSETNX', health, 'failing_ms', now)
call('HSET', health, 'failed_ms', now)
local reason = ARGV[8] == '1' and 'gone'
  or now - tonumber(call('HGET', health, 'failing_ms')) >= tonumber(ARGV[9]) and 'failing'
if not reason or call('HSETNX', health, 'disabled_ms', now) == 0 then
  return 1
end
call('HSET', health, 'reason', reason)
call('RPUSH', 'fb:webhook:outbox', cjson.encode({type = 'webhook_endpoint.disabled', tenant = tenant,
  endpoint = ARGV[7], reason = reason, ms = now}))
ring_webhooks()
return 2
