#!lua
-- The kept answer of a request, or who computes it now.
-- KEYS[1] answer  [2] claim to it
-- ARGV[1] who asks  [2] life of a claim (ms)
-- Returns {1, answer} | {0}: the asker has the claim now | {2}: somebody else has it.

local answer = call('GET', KEYS[1])
if answer then
  return {1, answer}
end
local holder = call('SET', KEYS[2], ARGV[1], 'NX', 'GET', 'PX', ARGV[2])
return {(not holder or holder == ARGV[1]) and 0 or 2}
