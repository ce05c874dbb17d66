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
  return stop(base_of(job.model), id, job, now_ms())
end

local results = {}
for k = 2, #ARGV do
  results[k - 1] = cancel(ARGV[k])
end
return results
