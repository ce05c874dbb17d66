#!lua flags=allow-oom
-- Cancels jobs: waiting ones at once, running ones as soon as their worker hears of it: at once by
-- the message on `<base>cancel`, or else with its next renewal (set x).
-- ARGV[1] tenant that must own them, or empty
-- ARGV[2…] job ids
-- Returns one number per id: 0 cancelled | 1 the worker is asked to stop | 2 terminal already |
-- -1 no such job.

local function cancel(id)
  local job = read_job(id)
  if not job or (ARGV[1] ~= '' and ARGV[1] ~= job.tenant) then
    return -1
  end
  local base = base_of(job.model)
  if job.status == 'queued' then
    unwait(base, id, job)
    finish(base, id, job, 'cancelled', now_ms(), {})
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

local results = {}
for k = 2, #ARGV do
  results[k - 1] = cancel(ARGV[k])
end
return results
