#!lua flags=allow-oom
-- Prolongs leases.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] owner  [2] lease (ms)  then job id, attempt, job id, attempt, …
-- Returns one number per pair: 0 prolonged | 1 lost | 2 prolonged, and cancel is wanted.

local base = KEYS[1]
local deadline = now_ms() + tonumber(ARGV[2])
local states = {}
for k = 3, #ARGV, 2 do
  local id = ARGV[k]
  local attempt, _, owner = read_lease(base, id)
  local state = 1
  if attempt and attempt == tonumber(ARGV[k + 1]) and owner == ARGV[1] then
    call('ZADD', base .. 'l', 'XX', deadline, id)
    state = call('SISMEMBER', base .. 'x', id) == 1 and 2 or 0
  end
  states[#states + 1] = state
end
return states
