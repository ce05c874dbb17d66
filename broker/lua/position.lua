#!lua flags=no-writes
-- Reads where a job stands in its queue.
-- KEYS[1] the job's record
-- ARGV[1] job id  [2] tenant that must own it, or empty  [3] jobs of the tenant looked at
-- Returns {-1}: no such job | {0}: it doesn't wait | {1, band, due (ms), outlook}: delayed |
-- {2, band, position, outlook, 1: exactly, 0: about}: in its tenant's list.

local id = ARGV[1]
local job = call('EXISTS', KEYS[1]) == 1 and read_job(id)
if not job or (ARGV[2] ~= '' and ARGV[2] ~= job.tenant) then
  return {-1}
end
if job.status ~= 'queued' then
  return {0}
end
local base = base_of(job.model)
local view = outlook(base, job.tenant, job.band, now_ms())
local due = call('ZSCORE', base .. 'd', id)
if due then
  return {1, job.band, tonumber(due), view}
end
local list = base .. 'q:' .. job.band .. ':' .. job.tenant
local place = call('LPOS', list, id, 'MAXLEN', ARGV[3])
if place then
  return {2, job.band, place, view, 1}
end
-- Far behind: as far in its own list as it is in its band.
local waiting, all = call('LLEN', list), call('ZCARD', base .. 'o:' .. job.band)
local rank = call('ZRANK', base .. 'o:' .. job.band, id) or all
place = math.max(math.floor(rank * waiting / math.max(all, 1)), tonumber(ARGV[3]))
return {2, job.band, math.min(place, math.max(waiting - 1, 0)), view, 0}
