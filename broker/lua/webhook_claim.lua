#!lua flags=allow-oom
-- Leases deliveries that are due; groups take turns.
-- ARGV[1] lease (ms)  [2] most deliveries
-- ARGV[3] bound of a group's deliveries at once  [4] of a tenant's  [5] of all
-- Returns {ms until the next one is due, or -1; then id, fields and values, …}

local lease, most, cap = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
-- Groups looked at by one claim, expired leases it takes back, and how long a group waits whose tenant
-- is at its bound.
local LOOKS, RECLAIMS, PAUSE_MS = 64, 64, 100

local now = now_ms()
for _, id in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, RECLAIMS)) do
  local raw = call('HMGET', delivery_of(id), 'group', 'tenant')
  if raw[1] then
    end_lease(id, raw[1], raw[2])
    wait_until(id, raw[1], now, cap)
  else
    call('ZREM', LEASES, id)
  end
end

local room = math.min(most, tonumber(ARGV[5]) - call('ZCARD', LEASES))
local claims, turns = {-1}, {}
while room > 0 and #turns < LOOKS do
  local group = call('ZRANGEBYSCORE', RING, '-inf', now, 'LIMIT', 0, 1)[1]
  if not group then
    break
  end
  local id, least = call('ZRANGE', due_of(group), 0, 0)[1], now
  local tenant = id and call('HGET', delivery_of(id), 'tenant')
  if id and not tenant then
    call('ZREM', due_of(group), id)
  elseif id and running_of('t:' .. tenant) >= tonumber(ARGV[4]) then
    least = now + PAUSE_MS
  elseif id then
    call('ZREM', due_of(group), id)
    call('ZADD', LEASES, now + lease, id)
    call('HINCRBY', RUNNING, 'g:' .. group, 1)
    call('HINCRBY', RUNNING, 't:' .. tenant, 1)
    call('HINCRBY', delivery_of(id), 'attempt', 1)
    claims[#claims + 1] = id
    claims[#claims + 1] = call('HGETALL', delivery_of(id))
    room = room - 1
  end
  call('ZREM', RING, group)
  turns[#turns + 1] = {group, least}
end
-- After the others that are due: one each before anybody's second.
for _, turn in ipairs(turns) do
  place(turn[1], cap, turn[2])
end
local first = call('ZRANGE', RING, 0, 0, 'WITHSCORES')
if first[1] then
  claims[1] = math.max(0, tonumber(first[2]) - now)
end
return claims
