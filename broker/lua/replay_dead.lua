#!lua
-- Puts the jobs of dead letters in again, oldest first, until one finds no room.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] tenant, or empty  [2] job id, or empty  [3] most jobs
-- ARGV[4] default bound of a tenant's waiting jobs  [5…] waiting jobs of the queue
-- from which on each band is refused
-- Returns the ids. Letters whose record is gone stay.

local base, now, replayed = KEYS[1], now_ms(), {}
for _, entry in ipairs(call('XRANGE', base .. 'dead', '-', '+')) do
  local id, tenant = entry[2][2], entry[2][4]
  if (ARGV[1] == '' or ARGV[1] == tenant) and (ARGV[2] == '' or ARGV[2] == id) then
    local job = read_job(id)
    if job then
      local refused, known = refusal(base, tenant, job.band, ARGV[4], ARGV[4 + PLACE[job.band]], now)
      if refused or #replayed >= tonumber(ARGV[3]) then
        return replayed
      end
      revive(base, id, job, 0, now, known)
      replayed[#replayed + 1] = id
    end
  end
end
return replayed
