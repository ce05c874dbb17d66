-- What time brings about: leases run out, delays end, deadlines pass.

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
