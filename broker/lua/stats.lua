#!lua flags=no-writes
-- Reads a queue; O(log jobs + tenants shown).
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] most tenants
-- Returns {now, {depth, oldest ms or 0, …} per band, delayed, in flight, dead, mode, refused
--          writes, drain rate (broker/drain.py), {tenant, waiting, running, drain rate, …}}.

local base = KEYS[1]
local bands, tenants = {}, {}
for _, band in ipairs(BANDS) do
  local oldest = call('ZRANGE', base .. 'o:' .. band, 0, 0, 'WITHSCORES')
  bands[#bands + 1] = call('ZCARD', base .. 'o:' .. band)
  bands[#bands + 1] = tonumber(oldest[2] or 0)
end
local most = tonumber(ARGV[1])
if most > 0 then
  for _, tenant in ipairs(call('ZREVRANGE', base .. 't', 0, most - 1)) do
    tenants[#tenants + 1] = tenant
    tenants[#tenants + 1] = tonumber(call('HGET', base .. 'n', tenant) or 0)
    tenants[#tenants + 1] = tonumber(call('HGET', base .. 'if', tenant) or 0)
    tenants[#tenants + 1] = call('HGET', base .. 's', 'd:' .. tenant)
  end
end
local state = call('HMGET', base .. 's', 'mode', 'stale', 'd')
return {now_ms(), bands, call('ZCARD', base .. 'd'), call('ZCARD', base .. 'l'),
  call('XLEN', base .. 'dead'), state[1], tonumber(state[2] or 0), state[3], tenants}
