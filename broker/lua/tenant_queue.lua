#!lua flags=no-writes
-- Reads a tenant's part of a queue.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] tenant
-- Returns {now, {depth, since when the first one waits (ms) or 0, …} per band, waiting, running,
--          mode, drain rate (broker/drain.py)}.

local base, tenant = KEYS[1], ARGV[1]
local bands = {}
for _, band in ipairs(BANDS) do
  local list = base .. 'q:' .. band .. ':' .. tenant
  local first = call('LINDEX', list, 0)
  bands[#bands + 1] = call('LLEN', list)
  bands[#bands + 1] = first and tonumber(call('ZSCORE', base .. 'o:' .. band, first) or 0) or 0
end
local state = call('HMGET', base .. 's', 'mode', 'd:' .. tenant)
return {now_ms(), bands, tonumber(call('HGET', base .. 'n', tenant) or 0),
  tonumber(call('HGET', base .. 'if', tenant) or 0), state[1], state[2]}
