#!lua flags=allow-oom
-- Prolongs or gives up a claim to an answer.
-- KEYS[1] claim
-- ARGV[1] who has it  [2] its life from now (ms); 0 gives it up
-- Returns 1 | 0: it was somebody else's, or nobody's.

if call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) > 0 then
  return call('PEXPIRE', KEYS[1], ARGV[2])
end
return call('DEL', KEYS[1])
