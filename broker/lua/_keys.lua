-- Keys of a queue, and what all scripts begin with. scripts.py puts this file, the other shared ones
-- and constants of the Python modules in front of each verb. Key names are those of broker/keys.py.
--
-- A script validates everything before its first write: Lua has no rollback.
--
-- Keys of a queue, after the base `fb:{<queue>}:`
--   j              HASH    job id -> `cost|band|tenant`, from enqueue to the terminal state
--   q:<band>:<t>   LIST    waiting job ids of tenant t; in at the tail, out at the head
--   o:<band>       ZSET    waiting job id -> when it came in (ms)
--   a:<band>       ZSET    tenant -> virtual time; it has waiting jobs and isn't parked
--   i:<band>       ZSET    tenant -> virtual time; idle or parked, as long as it is ahead of the clock
--   s              HASH    per band `V:<band>` (virtual clock) and `lag:<band>` (tokens owed);
--                          `due:<band>` (tokens taken beyond the charges, not yet in the lags);
--                          `taken`, `estimated` (fading sums over completed jobs);
--                          `u:<tenant>` (the same two of a tenant, packed);
--                          `mode` (`paused`, `draining`, or absent);
--                          `stale` (writes of stale attempts that were refused);
--                          `d`, `d:<tenant>` (drain rates: broker/drain.py);
--                          `b:<band>`, `w:<tenant>` (the same of jobs that hardly waited, idle time
--                          counted in: what comes in); `pace` (fading, packed: tokens of ended
--                          jobs, ms they ran, most jobs that ran side by side);
--                          `cursor`, `drains` (where the sweep goes on)
--   n, if          HASH    tenant -> waiting (queued + delayed) jobs; tenant -> running jobs
--   t              ZSET    tenant -> waiting + running jobs
--   park           SET     tenants at their cap
--   l, lo          ZSET, HASH  leases: id -> deadline (ms); id -> `attempt|charged tokens|owner`
--   d, x           ZSET, SET   delayed: id -> due (ms); running jobs that shall be cancelled
--   cancel         channel    ids of running jobs that shall be cancelled
--   e              ZSET    waiting (queued or delayed) job id -> its deadline (ms), if it has one
--   dead, bell     STREAM, LIST  dead letters; doorbell with at most one element
--   bell:batch     LIST    doorbell of workers that have room for batch jobs, when all that waits is
--                          batch and whoever looked has none
--   wake:<owner>   LIST    tells a worker that waits that it has room for batch jobs again
-- and the list `<queue>`: one empty element per waiting job, for readers of LLEN.

local call = redis.call

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function base_of(queue)
  return 'fb:{' .. queue .. '}:'
end

-- Names of a tenant's jobs that are lines of batches, until they end.
local function lines_of(tenant)
  return 'fb:tenant:' .. tenant .. ':lines'
end

local function mirror_of(base)
  return string.sub(base, 5, -3)
end

-- A tenant's own value, else the published default, else the one of the caller's settings.
local function policy(name, tenant, default)
  local values = call('HMGET', 'fb:policy:' .. name, tenant, '*')
  return tonumber(values[1] or values[2] or default)
end

-- `paused`: nothing is claimed; `draining`: nothing is put in; nil: both are done.
local function mode_of(base)
  return call('HGET', base .. 's', 'mode') or nil
end

local function ring(base, which)
  local bell = base .. (which or 'bell')
  if call('EXISTS', bell) == 0 then
    call('RPUSH', bell, '1')
  end
end

-- Counts down a hash field and drops it at zero; returns what is left.
local function count_down(key, field)
  local left = call('HINCRBY', key, field, -1)
  if left <= 0 then
    call('HDEL', key, field)
  end
  return left
end

-- One job less for a tenant.
local function count_out(base, tenant)
  if call('ZINCRBY', base .. 't', -1, tenant) == '0' then
    call('ZREM', base .. 't', tenant)
  end
end
