#!lua flags=no-writes
-- Reads where a job stands in its queue, and what its start is foretold from (broker/prospect.py).
-- KEYS[1] the job's record
-- ARGV[1] job id  [2] tenant that must own it, or empty  [3] jobs of the tenant looked at
-- Returns {-1}: no such job | {0}: it doesn't wait | {1, band, due (ms), view}: delayed |
-- {2, band, position, view, 1: exactly, 0: about}: in its tenant's list. See `view` for the view.

-- In constant time: at most RIVALS tenants that race in the band and as many at their cap.
-- {now, since when the oldest job waits, running jobs, waiting jobs per band (0: nobody there races),
--  own virtual time, {tenants that race in the band, tenants at their cap},
--  {virtual time, waiting jobs, 1: parked | 0, …} of rivals,
--  running jobs: own, rivals'; weights and caps: default, own, rivals'; state: drain of the queue, pace, what comes in per band,
--  drain of the tenant, what comes in of it, drains of rivals}
local function view(base, tenant, band, now)
  local oldest, waiting = now, {}
  for b, each in ipairs(BANDS) do
    local first = call('ZRANGE', base .. 'o:' .. each, 0, 0, 'WITHSCORES')
    oldest = math.min(oldest, tonumber(first[2] or now))
    waiting[b] = call('EXISTS', base .. 'a:' .. each) == 1 and call('ZCARD', base .. 'o:' .. each) or 0
  end
  local clock, list = clock_of(base, band), base .. 'q:' .. band .. ':'
  local own = call('ZSCORE', base .. 'a:' .. band, tenant)
  local names, rivals, drains = {}, {}, {}
  local function add(name, at, parked)
    local count = name ~= tenant and call('LLEN', list .. name) or 0
    if count > 0 then
      names[#names + 1], drains[#drains + 1] = name, 'd:' .. name
      rivals[#rivals + 1], rivals[#rivals + 2], rivals[#rivals + 3] = at, count, parked
    end
  end
  local ahead = call('ZRANGE', base .. 'a:' .. band, 0, RIVALS - 1, 'WITHSCORES')
  for k = 1, #ahead, 2 do
    add(ahead[k], ahead[k + 1], 0)
  end
  for _, name in ipairs(call('SRANDMEMBER', base .. 'park', RIVALS)) do
    local at = tonumber(call('ZSCORE', base .. 'i:' .. band, name) or clock)
    add(name, string.format('%.17g', math.max(at, clock)), 1)
  end
  if not own then
    own = math.max(tonumber(call('ZSCORE', base .. 'i:' .. band, tenant) or clock), clock)
    own = string.format('%.17g', own)
  end
  local state = {'d', 'pace'}
  for b, each in ipairs(BANDS) do
    state[2 + b] = 'b:' .. each
  end
  state[#state + 1], state[#state + 2] = 'd:' .. tenant, 'w:' .. tenant
  for _, each in ipairs(drains) do
    state[#state + 1] = each
  end
  return {now, oldest, call('ZCARD', base .. 'l'), waiting, own,
    {call('ZCARD', base .. 'a:' .. band), call('SCARD', base .. 'park')}, rivals,
    call('HMGET', base .. 'if', tenant, unpack(names)),
    call('HMGET', 'fb:policy:weight', '*', tenant, unpack(names)),
    call('HMGET', 'fb:policy:cap', '*', tenant, unpack(names)),
    call('HMGET', base .. 's', unpack(state))}
end

local id = ARGV[1]
local job = call('EXISTS', KEYS[1]) == 1 and read_job(id)
if not job or (ARGV[2] ~= '' and ARGV[2] ~= job.tenant) then
  return {-1}
end
if job.status ~= 'queued' then
  return {0}
end
local base = base_of(job.model)
local seen = view(base, job.tenant, job.band, now_ms())
local due = call('ZSCORE', base .. 'd', id)
if due then
  return {1, job.band, tonumber(due), seen}
end
local list = base .. 'q:' .. job.band .. ':' .. job.tenant
local place = call('LPOS', list, id, 'MAXLEN', ARGV[3])
if place then
  return {2, job.band, place, seen, 1}
end
-- Far behind: as far in its own list as it is in its band.
local waiting, all = call('LLEN', list), call('ZCARD', base .. 'o:' .. job.band)
local rank = call('ZRANK', base .. 'o:' .. job.band, id) or all
place = math.max(math.floor(rank * waiting / math.max(all, 1)), tonumber(ARGV[3]))
return {2, job.band, math.min(place, math.max(waiting - 1, 0)), seen, 0}
