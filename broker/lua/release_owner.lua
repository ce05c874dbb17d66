#!lua flags=allow-oom
-- Gives back leases of a worker that is gone. Reads all leases: for a worker's start, not a loop.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] owner  [2] most leases  [3] default cap
-- Returns how many were given back; when it is ARGV[2], there may be more.

local base, limit = KEYS[1], tonumber(ARGV[2])
local now, count = now_ms(), 0
local leases = call('HGETALL', base .. 'lo')
for k = 1, #leases, 2 do
  local owner = string.match(leases[k + 1], '^%d+|[^|]+|(.*)$')
  if owner == ARGV[1] and count < limit then
    local job = read_job(leases[k])
    if job then
      give_back(base, leases[k], job, 0, now, 0, false, 1, ARGV[3])
      count = count + 1
    end
  end
end
return count
