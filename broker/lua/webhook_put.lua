#!lua
-- Makes what lies first in the outbox into deliveries, or adds deliveries of no event.
-- KEYS[1] the outbox
-- ARGV[1] entries of the outbox that are done with this  [2] the first of them, or empty
-- ARGV[3] bound of a group's waiting deliveries  [4] entries of a log  [5] life of a log (ms)
-- ARGV[6] bound of a group's deliveries at once  [7] life of a delivery that is discarded (s)
-- then per delivery: id, group, tenant, log, number of further fields and values, these
-- Returns how many deliveries were made | -1: the outbox doesn't begin with ARGV[2] (another worker,
-- or this call once more, has done it).

local entries = tonumber(ARGV[1])
if entries > 0 and call('LINDEX', KEYS[1], 0) ~= ARGV[2] then
  return -1
end
local most, kept, cap = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
local time = call('TIME')
local now, made, k = now_ms(), 0, 8
while k <= #ARGV do
  local id, group, tenant, log, size = ARGV[k], ARGV[k + 1], ARGV[k + 2], ARGV[k + 3], tonumber(ARGV[k + 4])
  local key, fields = delivery_of(id), {}
  for n = 1, size do
    fields[n] = ARGV[k + 4 + n]
  end
  k = k + 5 + size
  if call('EXISTS', key) == 0 then
    local fits = call('ZCARD', due_of(group)) < most
    call('HSET', key, 'state', fits and 'pending' or 'discarded', 'group', group, 'tenant', tenant,
      'log', log, 'created_ms', now, 'next_ms', fits and now or 0, 'attempt', 0, 'failures', 0,
      unpack(fields))
    if fits then
      wait_until(id, group, now, cap)
    else
      call('EXPIRE', key, ARGV[7])
      call('HINCRBY', 'fb:webhook:counts', 'discarded', 1)
    end
    local index = 'fb:webhook:log:' .. log
    -- Microseconds, and one more for each: a log has an order.
    call('ZADD', index, time[1] * 1000000 + time[2] + made, id)
    call('PEXPIRE', index, ARGV[5])
    local over = call('ZCARD', index) - kept
    if over > 0 then
      local old = call('ZPOPMIN', index, over)
      for n = 1, #old, 2 do
        if call('HGET', delivery_of(old[n]), 'state') ~= 'pending' then
          call('DEL', delivery_of(old[n]))
        end
      end
    end
    made = made + 1
  end
end
if entries > 0 then
  call('LTRIM', KEYS[1], entries, -1)
end
if made > 0 then
  ring_webhooks()
end
return made
