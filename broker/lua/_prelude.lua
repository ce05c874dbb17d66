-- A job's record, its lease, its waiting and its end.

local DEAD_LETTERS = 1000

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
