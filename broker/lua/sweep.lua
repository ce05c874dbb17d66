#!lua flags=allow-oom
-- Heals what no other script sees to: expired leases, due delays and passed deadlines of a queue that nobody claims
-- from, a lost bell, a cap raised by default, and ids found in no queue, delay or lease.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] default cap  [2] ids to look at, about
-- Returns how many jobs were put back into the queue.

local base = KEYS[1]
local now = now_ms()
local healed = reclaim(base, now, 64, ARGV[1])
promote(base, now, 256)
expire(base, now, 256)

local scan = call('HSCAN', base .. 'j', call('HGET', base .. 's', 'cursor') or '0', 'COUNT', ARGV[2])
call('HSET', base .. 's', 'cursor', scan[1])
for k = 1, #scan[2], 2 do
  local id = scan[2][k]
  local band, tenant = string.match(scan[2][k + 1], '^%d+|(%a+)|(.*)$')
  if not (call('ZSCORE', base .. 'o:' .. band, id) or call('ZSCORE', base .. 'l', id)
      or call('ZSCORE', base .. 'd', id)) then
    local job = read_job(id)
    if job then
      call('HINCRBY', base .. 'n', tenant, 1)
      call('HSET', 'fb:job:' .. id, 'status', 'queued', 'seq', job.seq + 1)
      log_event(id, job.seq + 1, 'requeued', job.attempt)
      watch(base, id, job)
      put(base, 'LPUSH', id, band, tenant, now)
      healed = healed + 1
    else
      forget(base, id)
    end
  end
end

-- Rates of tenants that had nothing done for an hour are of no use, nor is what their jobs took.
scan = call('HSCAN', base .. 's', call('HGET', base .. 's', 'drains') or '0', 'MATCH', 'd:*',
  'COUNT', ARGV[2])
call('HSET', base .. 's', 'drains', scan[1])
for k = 1, #scan[2], 2 do
  if select(4, struct.unpack('<dddd', scan[2][k + 1])) < now - 3600000 then
    local tenant = string.sub(scan[2][k], 3)
    call('HDEL', base .. 's', scan[2][k], 'u:' .. tenant, 'w:' .. tenant)
  end
end

for _, tenant in ipairs(call('SRANDMEMBER', base .. 'park', 16)) do
  unpark(base, tenant, tonumber(call('HGET', base .. 'if', tenant) or 0), ARGV[1])
end
for _, band in ipairs(mode_of(base) ~= 'paused' and BANDS or {}) do
  if call('EXISTS', base .. 'a:' .. band) == 1 then
    ring(base)
  end
end
return healed
