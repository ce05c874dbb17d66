#!lua flags=allow-oom
-- Counts the jobs that could be leased now, after what a claim does before it leases.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] default cap  [2] most to count; as many tenants of a band are looked at
-- ARGV[3] batch jobs that the caller itself has room for, or empty: any number, anywhere
-- Returns {jobs for any worker, batch jobs for the caller}. Where it has no room and only batch jobs
-- wait, others are told (`bell:batch`).

local base, most = KEYS[1], tonumber(ARGV[2])
local now = now_ms()
reclaim(base, now, 64, ARGV[1])
promote(base, now, 256)
expire(base, now, 256)
if mode_of(base) == 'paused' then
  return {0, 0}
end

local room = {}
local function count(band, limit)
  local found = 0
  for _, tenant in ipairs(call('ZRANGE', base .. 'a:' .. band, 0, limit - 1)) do
    if not room[tenant] then
      local running = tonumber(call('HGET', base .. 'if', tenant) or 0)
      -- One that is at its cap and not parked yet is left to a claim to park.
      room[tenant] = math.max(policy('cap', tenant, ARGV[1]) - running, 1)
    end
    local taken = math.min(call('LLEN', base .. 'q:' .. band .. ':' .. tenant), room[tenant])
    room[tenant] = room[tenant] - taken
    found = found + taken
    if found >= limit then
      return limit
    end
  end
  return found
end

local anywhere, here, mine = 0, 0, tonumber(ARGV[3])
for b, band in ipairs(BANDS) do
  if anywhere >= most then
    break
  elseif b < #BANDS or not mine then
    anywhere = anywhere + count(band, most - anywhere)
  elseif mine > 0 then
    here = count(band, math.min(mine, most - anywhere))
  elseif anywhere == 0 and count(band, 1) > 0 then
    ring(base, 'bell:batch')
  end
end
return {anywhere, here}
