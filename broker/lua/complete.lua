#!lua flags=allow-oom
-- Makes a running job terminal; fenced by the attempt.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] job id  [2] attempt  [3] status: completed | failed | cancelled  [4] tokens really taken
-- ARGV[5] default weight  [6] default cap  [7] code of a dead letter, or empty
-- ARGV[8] members of the last message (`,"name":value…`), or empty
-- ARGV[9] tokens of input  [10] those of them that were cached  [11] tokens of output
-- ARGV[12…] further fields and values of the record (output, error, usage)
-- Returns 1 done, or done before by this very attempt | 0 stale, nothing changed.

-- A drain rate after this completion (broker/drain.py); `since` 0 counts idle time in, but before
-- the first one.
local function drained(drain, now, since, tokens)
  local jobs, sum, busy, at = 0, 0, 0, since
  if drain then
    jobs, sum, busy, at = struct.unpack('<dddd', drain)
  end
  local left = math.exp(-math.max(now - math.max(at, since), 0) / FADING_MS)
  return struct.pack('<dddd', jobs * left + 1, sum * left + tokens,
    busy * left + FADING_MS * (1 - left), math.max(now, at))
end

local base, id, attempt, status = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
local taken = tonumber(ARGV[4])
if not (attempt and taken and (status == 'completed' or status == 'failed'
    or status == 'cancelled')) then
  return redis.error_reply('ERR bad attempt, status or tokens')
end
local leased, charged = read_lease(base, id)
local job = read_job(id)
if not job or leased ~= attempt then
  if job and tonumber(call('HGET', 'fb:job:' .. id, 'ended') or 0) == attempt then
    return 1
  end
  count_stale(base)
  return 0
end

local now = now_ms()
local running = unlease(base, id, job.tenant, job.status)
taken = math.max(taken, LEAST_TOKENS)
local own, used, due = 'd:' .. job.tenant, 'u:' .. job.tenant, 'due:' .. job.band
local sums = call('HMGET', base .. 's', 'd', own, 'V:' .. job.band, due, 'taken', 'estimated', used,
  'pace')
if taken ~= charged then
  settle(base, job.band, job.tenant, taken, charged, policy('weight', job.tenant, ARGV[5]),
    tonumber(sums[3] or 0))
end
local changed = {'d', drained(sums[1], now, job.since, taken),
  own, drained(sums[2], now, job.since, taken),
  due, tonumber(sums[4] or 0) + (taken - charged)}
if status == 'completed' then
  local before, expected = 0, 0
  if sums[7] then
    before, expected = struct.unpack('<dd', sums[7])
  end
  changed[7], changed[8] = 'taken', tonumber(sums[5] or 0) * MEMORY + taken
  changed[9], changed[10] = 'estimated', tonumber(sums[6] or 0) * MEMORY + job.cost
  changed[11] = used
  changed[12] = struct.pack('<dd', before * MEMORY + taken, expected * MEMORY + job.cost)
end
local ran = math.max(now - (job.started or now), 0)
local tokens, spent, most = 0, 0, 0
if sums[8] then
  tokens, spent, most = struct.unpack('<ddd', sums[8])
end
most = math.max(most * PEAK_MEMORY, call('ZCARD', base .. 'l') + 1)
local k = #changed
changed[k + 1], changed[k + 2] = 'pace', struct.pack('<ddd', tokens * MEMORY + taken,
  spent * MEMORY + ran, most)
-- Of a tenant that lives on what comes in: the job waited no longer than it ran, and no more wait
-- behind it than run.
if now - ran - job.since <= ran
    and call('LLEN', base .. 'q:' .. job.band .. ':' .. job.tenant) <= running then
  local coming, mine = 'b:' .. job.band, 'w:' .. job.tenant
  local known = call('HMGET', base .. 's', coming, mine)
  changed[k + 3] = coming
  changed[k + 4] = drained(known[1], now, known[1] and 0 or job.since, taken)
  changed[k + 5] = mine
  changed[k + 6] = drained(known[2], now, known[2] and 0 or job.since, taken)
end
call('HSET', base .. 's', unpack(changed))
unpark(base, job.tenant, running, ARGV[6])
finish(base, id, job, status, now, {'ended', attempt, unpack(ARGV, 12)}, tonumber(ARGV[4]),
  ARGV[8], ARGV[9], ARGV[10], ARGV[11])
if ARGV[7] ~= '' and not job.erased then
  bury(base, id, job, now, ARGV[7])
end
return 1
