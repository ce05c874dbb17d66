-- Shared by the scripts of webhooks (broker/webhooks); in front of each, after the other shared files.
--
--   fb:webhook:delivery:<id>  HASH   a delivery: state (pending | delivered | failed | discarded), group,
--                                    tenant, log, attempt (fences), failures (place in the plan), …
--   fb:webhook:due:<group>    ZSET   waiting deliveries of a group -> due (ms)
--   fb:webhook:ring           ZSET   group -> when its next delivery is due, or since when it is its turn;
--                                    without groups that have none, and groups at their bound
--   fb:webhook:leases         ZSET   deliveries being sent -> when the lease runs out (ms)
--   fb:webhook:running        HASH   `g:<group>`, `t:<tenant>` -> deliveries being sent
-- A delivery is pending in its group's due set, or leased, or ended; never two of them.

local RING, LEASES, RUNNING = 'fb:webhook:ring', 'fb:webhook:leases', 'fb:webhook:running'

local function delivery_of(id)
  return 'fb:webhook:delivery:' .. id
end

local function due_of(group)
  return 'fb:webhook:due:' .. group
end

local function running_of(name)
  return tonumber(call('HGET', RUNNING, name) or 0)
end

-- Puts a group where its next delivery is due, not before `least`.
local function place(group, cap, least)
  local first = call('ZRANGE', due_of(group), 0, 0, 'WITHSCORES')
  if first[1] and running_of('g:' .. group) < cap then
    call('ZADD', RING, math.max(tonumber(first[2]), least), group)
  else
    call('ZREM', RING, group)
  end
end

local function wait_until(id, group, due, cap)
  call('ZADD', due_of(group), due, id)
  place(group, cap, 0)
end

local function ring_webhooks()
  if call('EXISTS', 'fb:webhook:bell') == 0 then
    call('RPUSH', 'fb:webhook:bell', '1')
  end
end

local function end_lease(id, group, tenant)
  call('ZREM', LEASES, id)
  count_down(RUNNING, 'g:' .. group)
  count_down(RUNNING, 't:' .. tenant)
end
