#!lua flags=allow-oom
-- Erases what a job says: prompt, output, text, metadata. One that hasn't ended is cancelled; what a
-- running one still brings is dropped when it ends. A content-free stub stays.
-- ARGV[1] job id  [2] tenant that must own it, or empty
-- Returns 0 erased | 1 its worker is asked to stop | -1 no such job.

local id = ARGV[1]
local job = read_job(id)
if not job or (ARGV[2] ~= '' and ARGV[2] ~= job.tenant) then
  return -1
end
local key, base, now = 'fb:job:' .. id, base_of(job.model), now_ms()
if not job.erased then
  job.erased = tostring(now)
  call('HSET', key, 'erased_ms', now)
end
local letter = call('HGET', key, 'letter')
if letter then
  call('XDEL', base .. 'dead', letter)
  call('HDEL', key, 'letter')
end
local result = stop(base, id, job, now)
if result == 1 then
  call('HDEL', key, 'body', 'metadata')
  return 1
end
if result == 2 then
  wipe(id)
end
return 0
