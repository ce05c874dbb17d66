#!lua
-- Puts a failed or expired job in again.
-- KEYS[1] the job's record
-- ARGV[1] job id  [2] tenant that must own it, or empty  [3] its new deadline (ms since 1970), or 0
-- ARGV[4] name of this call: a repeat of it is told the same
-- ARGV[5] default bound of the tenant's waiting jobs  [6…] waiting jobs of the queue from which on
-- each band is refused
-- Returns {0, position in the tenant's list, now, meters} | {-1}: no such job | {1, status}: it is
-- neither failed nor expired | {7, …} as an enqueue | what `refusal` returns.

local id, deadline = ARGV[1], tonumber(ARGV[3])
if not deadline then
  return redis.error_reply('ERR bad deadline')
end
local job = call('EXISTS', KEYS[1]) == 1 and read_job(id)
if not job or (ARGV[2] ~= '' and ARGV[2] ~= job.tenant) then
  return {-1}
end
if call('HGET', KEYS[1], 'retry') == ARGV[4] then
  return {0, 0, now_ms(), {}}
end
if job.erased then
  return {1, 'erased'}
end
if job.status ~= 'failed' and job.status ~= 'expired' then
  return {1, job.status}
end
local base, now = base_of(job.model), now_ms()
local over, wait, bound, before, after
if job.limits then
  local key_jobs = tonumber(call('HGET', KEYS[1], 'key_jobs') or 0)
  over, wait, bound, before, after =
    weigh(job.limits, job.tenant, job.key_id, key_jobs, job.cost, now)
end
if over then
  return {7, over, wait, bound, now, before,
    over >= 5 and outlook(base, job.tenant, job.band, now) or {}, job.band}
end
local refused, known = refusal(base, job.tenant, job.band, ARGV[5], ARGV[5 + PLACE[job.band]], now)
if refused then
  return refused
end
call('HSET', KEYS[1], 'retry', ARGV[4])
return {0, revive(base, id, job, deadline, now, known), now, after or {}}
