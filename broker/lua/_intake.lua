-- How a job comes to wait, for the first time or again.

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
