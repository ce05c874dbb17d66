#!lua flags=no-writes
-- Reads leases, those first that run out first. With an owner it looks at all of them.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] owner, or empty  [2] most leases
-- Returns per lease: job id, tenant, attempt, owner, when it runs out (ms), start of the attempt (ms).

local base, most, found = KEYS[1], tonumber(ARGV[2]), {}
local leases = call('ZRANGE', base .. 'l', 0, ARGV[1] == '' and most - 1 or -1, 'WITHSCORES')
for k = 1, #leases, 2 do
  local id = leases[k]
  local attempt, _, owner = read_lease(base, id)
  if most > 0 and attempt and (ARGV[1] == '' or ARGV[1] == owner) then
    local tenant = string.match(call('HGET', base .. 'j', id) or '', '^%d+|%a+|(.*)$')
    found[#found + 1] = {id, tenant or '', attempt, owner, tonumber(leases[k + 1]),
      tonumber(call('HGET', 'fb:job:' .. id, 'started_ms') or 0)}
    most = most - 1
  end
end
return found
