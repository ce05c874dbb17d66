#!lua flags=allow-oom
-- Cancels a job: a waiting one at once, a running one as soon as its worker hears of it.
-- KEYS[1] the job's record
-- ARGV[1] job id  [2] tenant that must own it, or empty
-- Returns 0 cancelled | 1 the worker is asked to stop | 2 terminal already | -1 no such job.

local id = ARGV[1]
local job = read_job(id)
if not job or (ARGV[2] ~= '' and ARGV[2] ~= job.tenant) then
  return -1
end
local base = base_of(job.model)
if job.status == 'queued' then
  unwait(base, id, job)
  finish(base, id, job, 'cancelled', now_ms(), {})
  return 0
elseif job.status == 'in_progress' then
  call('SADD', base .. 'x', id)
  call('HSET', KEYS[1], 'status', 'cancelling', 'seq', job.seq + 1)
  log_event(id, job.seq + 1, 'cancelling', job.attempt)
  return 1
elseif job.status == 'cancelling' then
  return 1
end
return 2
