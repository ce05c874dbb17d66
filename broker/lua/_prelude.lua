-- Shared by all scripts of a queue; scripts.py puts it, and constants made from
-- broker/jobs.py and broker/fairness.py, in front of each verb. Key names are those of broker/keys.py.
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

local DEAD_LETTERS = 1000
local EVENTS = 512

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

-- `told`: further members of the message, which the log doesn't have.
local function log_event(id, seq, kind, attempt, told)
  local line = '{"seq":' .. seq .. ',"type":"job.' .. kind .. '","attempt":' .. attempt
  call('RPUSH', 'fb:job:' .. id .. ':events', line .. '}')
  call('PUBLISH', 'fb:ev:' .. id, line .. (told or '') .. '}')
end

-- What the scripts need of a record, or nil.
local function read_job(id)
  local raw = call('HMGET', 'fb:job:' .. id, 'status', 'tenant', 'band', 'model', 'cost', 'attempt',
    'refunds', 'max_attempts', 'seq', 'result_ttl_s', 'deadline_ms',
    'created_ms', 'queued_ms', 'limits', 'key_id', 'erased_ms', 'webhook', 'started_ms', 'line')
  if not raw[1] then
    return nil
  end
  return {
    status = raw[1], tenant = raw[2], band = raw[3], model = raw[4],
    cost = tonumber(raw[5]), attempt = tonumber(raw[6] or 0), refunds = tonumber(raw[7] or 0),
    max_attempts = tonumber(raw[8]), seq = tonumber(raw[9]), ttl = tonumber(raw[10]),
    deadline = raw[11] or nil, since = tonumber(raw[13] or raw[12]),
    limits = raw[14] or nil, key_id = raw[15] or '', erased = raw[16], webhook = raw[17] or nil,
    started = tonumber(raw[18] or nil), line = raw[19],
  }
end

-- The lease of an id as attempt, charged cost, owner; nil when it has none.
local function read_lease(base, id)
  local raw = call('HGET', base .. 'lo', id)
  if not raw then
    return nil
  end
  local attempt, charged, owner = string.match(raw, '^(%d+)|([^|]+)|(.*)$')
  return tonumber(attempt), tonumber(charged), owner
end

-- Counts a refused write of an attempt that has lost its lease.
local function count_stale(base)
  call('HINCRBY', base .. 's', 'stale', 1)
end

-- Ends the lease of a job; returns how many jobs its tenant still runs. A job is in the set `x` as
-- long as its status is `cancelling`; without a status it may be.
local function unlease(base, id, tenant, status)
  call('ZREM', base .. 'l', id)
  call('HDEL', base .. 'lo', id)
  if status ~= 'in_progress' then
    call('SREM', base .. 'x', id)
  end
  return count_down(base .. 'if', tenant)
end

-- Takes a waiting job out of its list: one step at either end, a search from the head elsewhere.
local function unqueue(base, id, job)
  local list = base .. 'q:' .. job.band .. ':' .. job.tenant
  if call('LINDEX', list, -1) == id then
    call('RPOP', list)
  else
    call('LREM', list, 1, id)
  end
  call('ZREM', base .. 'o:' .. job.band, id)
  call('LPOP', mirror_of(base))
  if call('EXISTS', base .. 'q:' .. job.band .. ':' .. job.tenant) == 0 then
    leave(base, job.band, job.tenant)
  end
end

-- A job that waits again has its deadline before it again.
local function watch(base, id, job)
  if job.deadline then
    call('ZADD', base .. 'e', job.deadline, id)
  end
end

-- Ends the waiting of a job, in its list or delayed.
local function unwait(base, id, job)
  if call('ZREM', base .. 'd', id) == 0 then
    unqueue(base, id, job)
  end
  if job.deadline then
    call('ZREM', base .. 'e', id)
  end
  count_down(base .. 'n', job.tenant)
end

-- The rate limits of a job (`requests|tokens|jobs|requests of the key|tokens of the key`), as
-- {key of the meters, requests, tokens} for the tenant and its API key, and jobs at once.
local function read_limits(limits, tenant, key_id)
  local r, t, jobs, key_r, key_t = string.match(limits, '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)$')
  return {{'fb:limit:t:' .. tenant, tonumber(r), tonumber(t)},
    {'fb:limit:k:' .. key_id, tonumber(key_r), tonumber(key_t)}}, tonumber(jobs)
end

-- Puts right the tokens that were taken at submit: `tokens` is really taken minus taken then.
local function settle_limits(job, tokens, now)
  for _, scope in ipairs((read_limits(job.limits, job.tenant, job.key_id))) do
    if scope[3] > 0 and tokens ~= 0 then
      local at = call('HMGET', scope[1], 'requests', 'tokens')
      local to = math.max(now, math.max(tonumber(at[2] or now), now) + tokens * MINUTE_MS / scope[3])
      if at[2] or to > now then
        call('HSET', scope[1], 'tokens', string.format('%.17g', to))
        call('PEXPIRE', scope[1], math.ceil(math.max(to, tonumber(at[1] or 0)) - now) + 1000)
      end
    end
  end
end

-- Takes prompt, output and the caller's own words out of an ended job; who, what and when stay for
-- STUB_S. The last event says how it ended and has no text.
local function wipe(id)
  local key = 'fb:job:' .. id
  local answer = call('HGET', key, 'answer')
  if answer then
    call('UNLINK', answer)
  end
  call('HDEL', key, 'body', 'metadata', 'output', 'webhook', 'answer')
  call('LTRIM', key .. ':events', -1, -1)
  call('DEL', key .. ':text')
  call('EXPIRE', key, STUB_S)
  call('EXPIRE', key .. ':events', STUB_S)
end

-- Leaves word for the webhook worker; `event`: an OutboxEvent as JSON (broker/webhooks/outbox.py).
local function post(event)
  if call('LLEN', 'fb:webhook:outbox') >= WEBHOOK_EVENTS then
    call('HINCRBY', 'fb:webhook:counts', 'overflowed', 1)
    return
  end
  call('RPUSH', 'fb:webhook:outbox', event)
  if call('EXISTS', 'fb:webhook:bell') == 0 then
    call('RPUSH', 'fb:webhook:bell', '1')
  end
end

-- Leaves word of a job's end, where anybody wants it.
local function announce(id, job, status, seq, now)
  if job.webhook or call('EXISTS', 'fb:webhook:endpoints:' .. job.tenant) == 1 then
    post(cjson.encode({type = 'job.' .. status, tenant = job.tenant, job = id, seq = seq, ms = now,
      webhook = job.webhook}))
  end
end

-- Counts a job's end and its tokens (of input, of those cached, of output) to its tenant's hour.
local function tally(job, status, now, taken, cached, made)
  local hour = math.floor(now / HOUR_MS)
  local key, field = 'fb:usage:' .. job.tenant .. ':' .. math.floor(hour / 24), hour .. '|' .. job.model
  local known = call('HGET', key, field)
  local completed, failed, cancelled, expired, all_taken, all_cached, all_made = 0, 0, 0, 0, 0, 0, 0
  if known then
    completed, failed, cancelled, expired, all_taken, all_cached, all_made =
      struct.unpack('<IIIIddd', known)
  end
  if status == 'completed' then
    completed = completed + 1
  elseif status == 'failed' then
    failed = failed + 1
  elseif status == 'cancelled' then
    cancelled = cancelled + 1
  else
    expired = expired + 1
  end
  call('HSET', key, field, struct.pack('<IIIIddd', completed, failed, cancelled, expired,
    all_taken + taken, all_cached + cached, all_made + made))
  if not known then
    call('EXPIRE', key, USAGE_S)
  end
end

-- Makes a job terminal, once it is out of queue, delay and lease. `fields` are further fields and
-- values of the record (output, error, usage); `taken`: tokens that count towards limits; `told`:
-- members of the last message, to which the time of the end is added; then the tokens of its usage:
-- of input, of those cached, of output.
local function finish(base, id, job, status, now, fields, taken, told, input, cached, made)
  local key = 'fb:job:' .. id
  local seq = job.seq + 1
  call('HDEL', base .. 'j', id)
  count_out(base, job.tenant)
  if job.limits then
    settle_limits(job, (taken or 0) - job.cost, now)
    call('SREM', 'fb:key:' .. job.key_id .. ':jobs', id)
  end
  if job.line then
    call('SREM', lines_of(job.tenant), id)
  end
  call('HSET', key, 'status', status, 'finished_ms', now, 'seq', seq, unpack(fields))
  if told == '' or job.erased then
    told = nil
  end
  log_event(id, seq, status, job.attempt, told and told .. ',"finished_ms":' .. now)
  announce(id, job, status, seq, now)
  tally(job, status, now, input or 0, cached or 0, made or 0)
  call('EXPIRE', key, job.ttl)
  call('EXPIRE', key .. ':events', job.ttl)
  if seq > 3 then  -- queued, in progress, ended: there was no text
    call('EXPIRE', key .. ':text', job.ttl)
  end
  if job.erased then
    wipe(id)
  end
end

-- Cancels a job: 0 it was waiting and is gone | 1 its worker is asked to stop | 2 it had ended.
local function stop(base, id, job, now)
  if job.status == 'queued' then
    unwait(base, id, job)
    finish(base, id, job, 'cancelled', now, {})
    return 0
  elseif job.status == 'in_progress' then
    call('SADD', base .. 'x', id)
    call('HSET', 'fb:job:' .. id, 'status', 'cancelling', 'seq', job.seq + 1)
    log_event(id, job.seq + 1, 'cancelling', job.attempt)
    call('PUBLISH', base .. 'cancel', id)
    return 1
  end
  return job.status == 'cancelling' and 1 or 2
end

local function bury(base, id, job, now, code)
  local letter = call('XADD', base .. 'dead', 'MAXLEN', '=', DEAD_LETTERS, '*',
    'id', id, 'tenant', job.tenant, 'code', code, 'attempt', job.attempt, 'ms', now)
  call('HSET', 'fb:job:' .. id, 'letter', letter)
end

-- Ends an attempt that did not finish its job: back into the queue (after delay_ms), or cancelled
-- when that was asked for, or failed when the attempts are used up. `refund`: the attempt did not
-- count; the number itself is never used again, as it fences.
local function give_back(base, id, job, charged, now, delay_ms, refund, weight, cap)
  local cancel = call('SISMEMBER', base .. 'x', id) == 1
  local running = unlease(base, id, job.tenant, job.status)
  if refund then
    job.refunds = job.refunds + 1
    settle(base, job.band, job.tenant, 0, charged, weight, clock_of(base, job.band))
    local due = 'due:' .. job.band
    call('HSET', base .. 's', due, tonumber(call('HGET', base .. 's', due) or 0) - charged)
  end
  unpark(base, job.tenant, running, cap)
  if cancel then
    finish(base, id, job, 'cancelled', now, {})
  elseif job.attempt - job.refunds >= job.max_attempts then
    finish(base, id, job, 'failed', now, {'error',
      '{"code":"max_attempts","message":"The job was started ' .. job.attempt
      .. ' times and its worker was lost each time."}'})
    bury(base, id, job, now, 'max_attempts')
  else
    call('HINCRBY', base .. 'n', job.tenant, 1)
    call('HSET', 'fb:job:' .. id, 'status', 'queued', 'seq', job.seq + 1,
      'refunds', job.refunds)
    log_event(id, job.seq + 1, 'requeued', job.attempt)
    watch(base, id, job)
    if delay_ms > 0 then
      call('ZADD', base .. 'd', now + delay_ms, id)
    else
      put(base, 'LPUSH', id, job.band, job.tenant, now)
    end
  end
end

-- Ends a job that waited beyond its deadline.
local function overdue(base, id, job, now)
  finish(base, id, job, 'expired', now, {'error',
    '{"code":"deadline_exceeded","message":"The job was not started before its deadline."}'})
end

-- Drops a job whose record was deleted from outside.
local function forget(base, id)
  local tenant = string.match(call('HGET', base .. 'j', id) or '', '^%d+|%a+|(.*)$')
  if tenant then
    if read_lease(base, id) then
      unlease(base, id, tenant)
    else
      count_down(base .. 'n', tenant)
    end
    call('HDEL', base .. 'j', id)
    call('ZREM', base .. 'e', id)
    count_out(base, tenant)
  else
    call('ZREM', base .. 'l', id)
    call('HDEL', base .. 'lo', id)
  end
end

-- Takes back leases that have run out; at most `limit`. Returns how many.
local function reclaim(base, now, limit, cap)
  local ids = call('ZRANGEBYSCORE', base .. 'l', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    local job = read_job(id)
    if job then
      give_back(base, id, job, 0, now, 0, false, 1, cap)
    else
      forget(base, id)
    end
  end
  return #ids
end

-- Puts delayed jobs that are due into their queues; at most `limit`.
local function promote(base, now, limit)
  local ids = call('ZRANGEBYSCORE', base .. 'd', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    call('ZREM', base .. 'd', id)
    local job = read_job(id)
    if job then
      put(base, 'RPUSH', id, job.band, job.tenant, now)
    else
      forget(base, id)
    end
  end
end

-- Ends waiting jobs whose deadline has passed; at most `limit`.
local function expire(base, now, limit)
  local ids = call('ZRANGEBYSCORE', base .. 'e', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    local job = read_job(id)
    if job then
      unwait(base, id, job)
      overdue(base, id, job, now)
    else
      -- Its place in the list is cleared when its turn comes.
      call('ZREM', base .. 'e', id)
    end
  end
end

-- What forecasts for a tenant in a band are made of (broker/forecast.py): now, drain of the queue
-- and of the tenant, since when the oldest job and the tenant's first one wait, tenants that may run
-- per band, whether the tenant is parked, whether it races, and weights: default, own, some rivals'.
local function outlook(base, tenant, band, now)
  local oldest, since, racing = now, now, {}
  for b, each in ipairs(BANDS) do
    local first = call('ZRANGE', base .. 'o:' .. each, 0, 0, 'WITHSCORES')
    oldest = math.min(oldest, tonumber(first[2] or now))
    racing[b] = call('ZCARD', base .. 'a:' .. each)
  end
  local head = call('LINDEX', base .. 'q:' .. band .. ':' .. tenant, 0)
  if head then
    since = tonumber(call('ZSCORE', base .. 'o:' .. band, head) or now)
  end
  local drains = call('HMGET', base .. 's', 'd', 'd:' .. tenant)
  local rivals = call('ZRANGE', base .. 'a:' .. band, 0, RIVALS - 1)
  return {now, drains[1], drains[2], oldest, since, racing, call('SISMEMBER', base .. 'park', tenant),
    call('ZSCORE', base .. 'a:' .. band, tenant) and 1 or 0,
    call('HMGET', 'fb:policy:weight', '*', tenant, unpack(rivals))}
end

-- Why one more job of a tenant can't wait here, as a reply; nil and the number of known jobs when
-- it can. `mark`: waiting jobs of the queue from which on this band is refused.
-- {2: the tenant's bound | 3: the mark, bound or mark, outlook, waiting jobs, band} | {6}: draining
local function refusal(base, tenant, band, default_bound, mark, now)
  if mode_of(base) == 'draining' then
    return {6}
  end
  local bound = policy('max_queued', tenant, default_bound)
  if tonumber(call('HGET', base .. 'n', tenant) or 0) >= bound then
    return {2, bound, outlook(base, tenant, band, now), 0, band}
  end
  local known = call('HLEN', base .. 'j')
  local waiting = known - call('ZCARD', base .. 'l')
  if waiting >= tonumber(mark) then
    return {3, tonumber(mark), outlook(base, tenant, band, now), waiting, band}
  end
  return nil, known
end

-- Drops some ids of a set of jobs that have no place in it: their record was deleted, or an older
-- version ended them.
local function weed(held)
  for _, id in ipairs(call('SRANDMEMBER', held, 16)) do
    local state = call('HMGET', 'fb:job:' .. id, 'status', 'finished_ms')
    if not state[1] or state[2] then
      call('SREM', held, id)
    end
  end
end

-- Jobs of a tenant in all queues that are not terminal, without lines of batches: counted where they
-- are, so that nothing can be left over.
local function jobs_of(tenant, now)
  local sum = 0
  for _, queue in ipairs(call('SMEMBERS', 'fb:queues')) do
    sum = sum + tonumber(call('ZSCORE', base_of(queue) .. 't', tenant) or 0)
  end
  local held = lines_of(tenant)
  local lines = call('SCARD', held)
  if lines > 0 and (now % 8 == 0 or lines > sum) then
    weed(held)
    lines = call('SCARD', held)
  end
  return math.max(sum - lines, 0)
end

-- Whether an API key has as many jobs as it may have. Its set names them, so that no count can drift;
-- what still could be left over in it (a record that was deleted, a job that an older version ended)
-- goes before anybody is refused for it.
local function key_is_full(key_id, bound)
  local held = 'fb:key:' .. key_id .. ':jobs'
  if call('SCARD', held) < bound then
    return false
  end
  weed(held)
  return call('SCARD', held) >= bound
end

-- Looks at the limits of a job (GCRA, see broker/limits.py); `key_jobs`: jobs at once of its key, 0 is
-- without a bound. Returns which one doesn't let it in (1…4, the one that takes longest; jobs at once:
-- 5 of the tenant, 6 of the key) or nil, how long (ms), the limit; the meters as limit, TAT, … before
-- it and after it; and what to write then.
local function weigh(limits, tenant, key_id, key_jobs, cost, now)
  local scopes, jobs = read_limits(limits, tenant, key_id)
  local which, longest, bound, before, after, writes = nil, TOLERANCE_MS, 0, {}, {}, {}
  for n, scope in ipairs(scopes) do
    local requests, tokens = scope[2], scope[3]
    local at = (requests > 0 or tokens > 0) and call('HMGET', scope[1], 'requests', 'tokens') or {}
    local write, last = {scope[1]}, 0
    for k = 1, 2 do
      local limit, place = scope[k + 1], 4 * n + 2 * k - 5
      before[place], before[place + 1] = limit, at[k] or ''
      after[place], after[place + 1] = limit, ''
      if limit > 0 then
        local units, step = k == 1 and 1 or cost, MINUTE_MS / limit
        local from = math.max(tonumber(at[k] or now), now)
        local wait = from + math.min(units, limit) * step - now - MINUTE_MS
        if wait > longest then
          which, longest, bound = 2 * n + k - 2, wait, limit
        end
        local to = string.format('%.17g', from + units * step)
        after[place + 1] = to
        write[#write + 1] = k == 1 and 'requests' or 'tokens'
        write[#write + 1] = to
        last = math.max(last, from + units * step)
      else
        last = math.max(last, tonumber(at[k] or 0))
      end
    end
    if #write > 1 then
      writes[#writes + 1] = {write, scope[1], math.ceil(last - now) + 1000}
    end
  end
  if not which and jobs > 0 and jobs_of(tenant, now) >= jobs then
    which, longest, bound = 5, 0, jobs
  end
  if not which and key_jobs > 0 and key_is_full(key_id, key_jobs) then
    which, longest, bound = 6, 0, key_jobs
  end
  return which, math.ceil(longest), bound, before, after, writes
end

-- Takes what `weigh` has found, and a place among the jobs of the key where they are bounded.
local function take_limits(id, writes, key_id, key_jobs)
  if key_jobs > 0 then
    call('SADD', 'fb:key:' .. key_id .. ':jobs', id)
  end
  for _, write in ipairs(writes) do
    call('HSET', unpack(write[1]))
    call('PEXPIRE', write[2], write[3])
  end
end

-- Counts a job in that is going to wait; `known`: jobs of the queue before.
local function take_in(base, id, cost, band, tenant, known)
  call('HSET', base .. 'j', id, cost .. '|' .. band .. '|' .. tenant)
  if known == 0 then
    call('SADD', 'fb:queues', mirror_of(base))
  end
  call('HINCRBY', base .. 'n', tenant, 1)
  call('ZINCRBY', base .. 't', 1, tenant)
end

-- Starts a failed or expired job's life again, at the tail of its tenant's list. Attempts go on
-- counting, as they fence, and none of the old ones is held against it. Returns its position.
local function revive(base, id, job, deadline, now, known)
  local key = 'fb:job:' .. id
  local letter = call('HGET', key, 'letter')
  if letter then
    call('XDEL', base .. 'dead', letter)
  end
  call('HDEL', key, 'error', 'output', 'usage', 'started_ms', 'finished_ms', 'deadline_ms', 'letter')
  call('HSET', key, 'status', 'queued', 'seq', job.seq + 1, 'refunds', job.attempt,
    'queued_ms', now)
  call('PERSIST', key)
  call('PERSIST', key .. ':events')
  call('DEL', key .. ':text')
  if job.limits then
    local key_jobs = tonumber(call('HGET', key, 'key_jobs') or 0)
    local _, _, _, _, _, writes = weigh(job.limits, job.tenant, job.key_id, 0, job.cost, now)
    take_limits(id, writes, job.key_id, key_jobs)
  end
  call('ZADD', 'fb:tenant:' .. job.tenant .. ':jobs', 'NX', call('HGET', key, 'created_ms'), id)
  log_event(id, job.seq + 1, 'queued', job.attempt)
  take_in(base, id, job.cost, job.band, job.tenant, known)
  if deadline > 0 then
    job.deadline = deadline
    call('HSET', key, 'deadline_ms', deadline)
    watch(base, id, job)
  end
  return put(base, 'RPUSH', id, job.band, job.tenant, now) - 1
end
