#!lua flags=allow-oom
-- Drops dead letters; their jobs' records live out their time.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] tenant, or empty  [2] job id, or empty
-- Returns how many.

local key, purged = KEYS[1] .. 'dead', 0
for _, entry in ipairs(call('XRANGE', key, '-', '+')) do
  local id, tenant = entry[2][2], entry[2][4]
  if (ARGV[1] == '' or ARGV[1] == tenant) and (ARGV[2] == '' or ARGV[2] == id) then
    call('XDEL', key, entry[1])
    call('HDEL', 'fb:job:' .. id, 'letter')
    purged = purged + 1
  end
end
return purged
