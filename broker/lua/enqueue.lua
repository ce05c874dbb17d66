#!lua
-- Puts a job in.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] job id  [2] tenant  [3] band  [4] cost (tokens)  [5] delay (ms)
-- ARGV[6] default bound of the tenant's waiting jobs
-- ARGV[7] waiting jobs of the queue from which on this band is refused
-- ARGV[8] deadline (ms since 1970), or 0
-- ARGV[9] key of the idempotency entry, or empty  [10] digest of the request  [11] life of the entry
-- ARGV[12] rate limits (see `read_limits`), or empty  [13] id of the API key
-- ARGV[14] bound of the key's jobs at once, or 0; with one there are rate limits, if only of 0. Or
--          `line`: it is a line of a batch, without limits and not counted among its tenant's jobs
-- ARGV[15…] further fields and values of the record
-- Returns {0, position in the tenant's list, now, meters} | {1, position, now, meters}: this id
-- exists | {4, position, now, meters, id}: accepted before, as this id | {5, id}: the idempotency key
-- belongs to another request | {7, limit that is reached, wait (ms), its bound, now, meters, outlook
-- if it is jobs at once, band} | what `refusal` returns. Meters and limits: see `weigh`; no meters
-- without rate limits.
-- The event `job.queued` (seq 1) isn't written: it is told by the record alone.

local base, id, tenant, band = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local cost, delay, deadline = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[8])
local record = 'fb:job:' .. id
local list = base .. 'q:' .. band .. ':' .. tenant
-- Ids in a tenant's index are dropped after 8 days, or when their record is gone.
local RETENTION_MS = 691200000

if not (SHARE[band] and cost and cost >= 1 and delay and delay >= 0 and deadline) then
  return redis.error_reply('ERR bad band, cost, delay or deadline')
end
local now = now_ms()
local over, wait, bound, before, after, writes, key_jobs
if ARGV[12] ~= '' then
  key_jobs = tonumber(ARGV[14])
  over, wait, bound, before, after, writes = weigh(ARGV[12], tenant, ARGV[13], key_jobs, cost, now)
end
if ARGV[9] ~= '' then
  local known = call('GET', ARGV[9])
  if known then
    local request, first = string.match(known, '^(%x+)|(.*)$')
    if request ~= ARGV[10] then
      return {5, first}
    end
    local position = first == id and math.max(call('LLEN', list) - 1, 0) or 0
    return {4, position, now, before or {}, first}
  end
end
if call('EXISTS', record) == 1 then
  return {1, math.max(call('LLEN', list) - 1, 0), now, before or {}}
end
if over then
  return {7, over, wait, bound, now, before,
    over >= 5 and outlook(base, tenant, band, now) or {}, band}
end
local refused, known = refusal(base, tenant, band, ARGV[6], ARGV[7], now)
if refused then
  return refused
end

call('HSET', record, 'status', 'queued', 'tenant', tenant, 'band', band, 'cost', ARGV[4],
  'created_ms', now, 'seq', 1, unpack(ARGV, 15))
if writes then
  call('HSET', record, 'limits', ARGV[12])
  if key_jobs > 0 then
    call('HSET', record, 'key_jobs', key_jobs)
  end
  take_limits(id, writes, ARGV[13], key_jobs)
end
if ARGV[14] == 'line' then
  call('SADD', lines_of(tenant), id)
end
if ARGV[9] ~= '' then
  call('SET', ARGV[9], ARGV[10] .. '|' .. id, 'PX', ARGV[11])
end
take_in(base, id, ARGV[4], band, tenant, known)

local index = 'fb:tenant:' .. tenant .. ':jobs'
call('ZADD', index, now, id)
if now % 8 == 0 then
  for _, old in ipairs(call('ZRANGE', index, 0, 15)) do
    if call('EXISTS', 'fb:job:' .. old) == 0 then
      call('ZREM', index, old)
    end
  end
  local old = call('ZRANGEBYSCORE', index, '-inf', now - RETENTION_MS, 'LIMIT', 0, 16)
  if #old > 0 then
    call('ZREM', index, unpack(old))
  end
  call('PEXPIRE', index, RETENTION_MS)
end

if deadline > 0 then
  call('HSET', record, 'deadline_ms', ARGV[8])
  call('ZADD', base .. 'e', ARGV[8], id)
end
if delay > 0 then
  call('HSET', record, 'queued_ms', now + delay)
  call('ZADD', base .. 'd', now + delay, id)
  return {0, call('LLEN', list), now, after or {}}
end
return {0, put(base, 'RPUSH', id, band, tenant, now) - 1, now, after or {}}
