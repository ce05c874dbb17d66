#!lua flags=allow-oom
-- Counts the jobs that could be leased now, after what a claim does before it leases.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] default cap  [2] most to count; as many tenants of a band are looked at
-- Returns the number.

local base, most = KEYS[1], tonumber(ARGV[2])
local now = now_ms()
reclaim(base, now, 64, ARGV[1])
promote(base, now, 256)
expire(base, now, 256)
if mode_of(base) == 'paused' then
  return 0
end

local room, count = {}, 0
for _, band in ipairs(BANDS) do
  for _, tenant in ipairs(call('ZRANGE', base .. 'a:' .. band, 0, most - 1)) do
    if not room[tenant] then
      local running = tonumber(call('HGET', base .. 'if', tenant) or 0)
      -- One that is at its cap and not parked yet is left to a claim to park.
      room[tenant] = math.max(policy('cap', tenant, ARGV[1]) - running, 1)
    end
    local taken = math.min(call('LLEN', base .. 'q:' .. band .. ':' .. tenant), room[tenant])
    room[tenant] = room[tenant] - taken
    count = count + taken
    if count >= most then
      return most
    end
  end
end
return count
