-- Rate limits of tenants and API keys, and their jobs at once (broker/limits.py).

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
