#!lua flags=allow-oom
-- Gives a running job back; fenced by the attempt.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] job id  [2] attempt  [3] delay (ms)  [4] 1: the attempt doesn't count, else 0
-- ARGV[5] default weight  [6] default cap
-- Returns 1 done, or done before by this very attempt | 0 stale, nothing changed.

local base, id, attempt, delay = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if not (attempt and delay) then
  return redis.error_reply('ERR bad attempt or delay')
end
local leased, charged = read_lease(base, id)
local job = read_job(id)
if not job or leased ~= attempt then
  if job and tonumber(call('HGET', 'fb:job:' .. id, 'released') or 0) == attempt then
    return 1
  end
  count_stale(base)
  return 0
end
give_back(base, id, job, charged, now_ms(), delay, ARGV[4] == '1',
  policy('weight', job.tenant, ARGV[5]), ARGV[6])
call('HSET', 'fb:job:' .. id, 'released', attempt)
return 1
