-- The race of the tenants for turns: virtual times, places, caps (broker/fairness.py).

-- Remembers the virtual time of a tenant that leaves the race. Entries which the clock has passed
-- mean nothing (a tenant comes back at max(own, clock)); each call removes two of them at most.
local function remember(base, band, tenant, vtime, clock)
  local key = base .. 'i:' .. band
  call('ZADD', key, vtime, tenant)
  local passed = call('ZRANGEBYSCORE', key, '-inf', clock, 'LIMIT', 0, 2)
  if #passed > 0 then
    call('ZREM', key, unpack(passed))
  end
end

local function clock_of(base, band)
  return tonumber(call('HGET', base .. 's', 'V:' .. band) or 0)
end

-- The tenant has waiting jobs in this band and may run them: it comes back at max(own, clock).
local function join(base, band, tenant)
  local at = clock_of(base, band)
  local own = call('ZSCORE', base .. 'i:' .. band, tenant)
  if own then
    call('ZREM', base .. 'i:' .. band, tenant)
    at = math.max(at, tonumber(own))
  end
  call('ZADD', base .. 'a:' .. band, at, tenant)
end

-- The tenant has no waiting job left in this band, or is at its cap. A band that nobody races in is
-- owed nothing.
local function leave(base, band, tenant)
  local own = call('ZSCORE', base .. 'a:' .. band, tenant)
  if own then
    call('ZREM', base .. 'a:' .. band, tenant)
    remember(base, band, tenant, own, clock_of(base, band))
    if call('EXISTS', base .. 'a:' .. band) == 0 then
      call('HSET', base .. 's', 'lag:' .. band, 0)
    end
  end
end

-- The tenant has as many running jobs as it may have.
local function park(base, tenant)
  call('SADD', base .. 'park', tenant)
  for _, band in ipairs(BANDS) do
    leave(base, band, tenant)
  end
end

-- Lets a parked tenant run again when it is below its cap.
local function unpark(base, tenant, running, default_cap)
  if call('SISMEMBER', base .. 'park', tenant) == 0
      or running >= policy('cap', tenant, default_cap) then
    return
  end
  call('SREM', base .. 'park', tenant)
  for _, band in ipairs(BANDS) do
    if call('EXISTS', base .. 'q:' .. band .. ':' .. tenant) == 1 then
      join(base, band, tenant)
      ring(base)
    end
  end
end

-- Puts an id into its tenant's list (push is RPUSH: tail, or LPUSH: head); returns the list's length.
local function put(base, push, id, band, tenant, now)
  local length = call(push, base .. 'q:' .. band .. ':' .. tenant, id)
  call('ZADD', base .. 'o:' .. band, now, id)
  call('RPUSH', mirror_of(base), '')
  if call('SISMEMBER', base .. 'park', tenant) == 0 then
    if length == 1 then
      join(base, band, tenant)
    end
    ring(base)
  end
  return length
end

-- Corrects what a start was charged: the job took `taken`. A refund reaches below the clock by no more
-- than that, so that it can't hold up tenants who came while the charge stood; and not at all when the
-- tenant doesn't race. The caller puts the difference into `due:<band>`.
local function settle(base, band, tenant, taken, charged, weight, clock)
  local tokens = taken - charged
  if tokens == 0 then
    return
  end
  local key = base .. 'a:' .. band
  local own = tonumber(call('ZSCORE', key, tenant) or nil)
  if own then
    local least = math.min(own, clock - taken / weight)
    call('ZADD', key, math.max(least, own + tokens / weight), tenant)
    return
  end
  key = base .. 'i:' .. band
  own = call('ZSCORE', key, tenant)
  local from = math.max(clock, tonumber(own or clock))
  local to = math.max(clock, from + tokens / weight)
  if own or to > clock then
    call('ZADD', key, to, tenant)
  end
end
