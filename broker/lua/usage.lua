#!lua flags=no-writes
-- Reads what a tenant used (broker/usage.py).
-- KEYS[1] prefix of the tenant's days `fb:usage:<tenant>:`
-- ARGV[1] hours
-- Returns {now, {`<hour>|<model>`, packed sums, …}} of all days that these hours touch.

local now, found = now_ms(), {}
local hour = math.floor(now / HOUR_MS)
for day = math.floor((hour - ARGV[1] + 1) / 24), math.floor(hour / 24) do
  for _, part in ipairs(call('HGETALL', KEYS[1] .. day)) do
    found[#found + 1] = part
  end
end
return {now, found}
