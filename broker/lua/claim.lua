#!lua flags=allow-oom
-- Leases jobs to a worker in fair order (broker/fairness.py is the specification).
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] owner  [2] lease (ms)  [3] most jobs  [4] default weight  [5] default cap
-- ARGV[6] most batch jobs among them
-- Returns a flat list of id, record (a flat list of fields and values), id, record, …; and 1 at its
-- end when there is more to claim.

local base, owner = KEYS[1], ARGV[1]
local lease_ms, wanted = tonumber(ARGV[2]), tonumber(ARGV[3])
-- Most expired leases, due delays, passed deadlines and parkings one claim sees to; the rest is left
-- to the next one.
local RECLAIMS, PROMOTIONS, DEADLINES, PARKINGS = 16, 32, 32, 32

local room = tonumber(ARGV[6])
if not (lease_ms and wanted and tonumber(ARGV[4]) and tonumber(ARGV[5]) and room) then
  return redis.error_reply('ERR bad lease or limit')
end

local now = now_ms()
reclaim(base, now, RECLAIMS, ARGV[5])
promote(base, now, PROMOTIONS)
expire(base, now, DEADLINES)

local clock, lag, head = {}, {}, {}
STATE[#STATE + 1], STATE[#STATE + 2], STATE[#STATE + 3] = 'mode', 'taken', 'estimated'
local state = call('HMGET', base .. 's', unpack(STATE))
if state[#STATE - 2] == 'paused' then
  return {}
end
local taken, estimated = tonumber(state[#STATE - 1] or 0), tonumber(state[#STATE] or 0)
for b = 1, #BANDS do
  clock[b] = tonumber(state[b] or 0)
  lag[b] = tonumber(state[#BANDS + b] or 0)
end

-- The part of their cost that the tenant's jobs take: its own, or that of all jobs.
local ratios = {}
local function ratio(tenant)
  local known = ratios[tenant]
  if not known then
    local took, expected = taken, estimated
    local used = call('HGET', base .. 's', 'u:' .. tenant)
    if used then
      took, expected = struct.unpack('<dd', used)
    end
    known = expected > 0 and math.min(took / expected, 1) or 1
    ratios[tenant] = known
  end
  return known
end

-- A band without room starts nothing.
local function may(b)
  return head[b] and (b < #BANDS or room > 0)
end

local function look(b)
  local first = call('ZRANGE', base .. 'a:' .. BANDS[b], 0, 0, 'WITHSCORES')
  head[b] = first[1] and first or nil
  if not head[b] then
    lag[b] = 0
  end
end

local function head_cost(b)
  local id = call('LINDEX', base .. 'q:' .. BANDS[b] .. ':' .. head[b][1], 0)
  return tonumber(string.match(call('HGET', base .. 'j', id) or '1|', '^(%d+)|'))
end

-- The highest band with work, unless a lower one is owed its next job; most owed per share first.
local function choose()
  local chosen, most = nil, 0
  for b = 1, #BANDS do
    if may(b) then
      if not chosen then
        chosen = b
      elseif lag[b] / SHARE[BANDS[b]] > most and lag[b] >= head_cost(b) * ratio(head[b][1]) then
        chosen, most = b, lag[b] / SHARE[BANDS[b]]
      end
    end
  end
  return chosen
end

local claims, popped, parkings, late = {}, 0, 0, 0
for b = 1, #BANDS do
  look(b)
end
-- What jobs took beyond their charges, or less, goes into the lags.
local balanced = false
for b = 1, #BANDS do
  local due = tonumber(state[2 * #BANDS + b] or 0)
  if due ~= 0 then
    balanced = true
    local total = 0
    for each = 1, #BANDS do
      total = total + ((head[each] or each == b) and SHARE[BANDS[each]] or 0)
    end
    for each = 1, #BANDS do
      if head[each] then
        lag[each] = lag[each] + due * SHARE[BANDS[each]] / total
        lag[each] = lag[each] - (each == b and due or 0)
      end
    end
  end
end

while wanted > 0 and parkings < PARKINGS and late < DEADLINES do
  local b = choose()
  if not b then
    break
  end
  local band, tenant, vtime = BANDS[b], head[b][1], tonumber(head[b][2])
  local cap = policy('cap', tenant, ARGV[5])
  -- Counted in at once; out again where nothing starts.
  local running = call('HINCRBY', base .. 'if', tenant, 1)
  if running > cap then
    count_down(base .. 'if', tenant)
    parkings = parkings + 1
    park(base, tenant)
    for each = 1, #BANDS do
      look(each)
    end
  else
    local list = base .. 'q:' .. band .. ':' .. tenant
    local id = call('LPOP', list)
    local raw = call('HGETALL', 'fb:job:' .. id)
    local at = {}
    for k = 1, #raw, 2 do
      at[raw[k]] = k + 1
    end
    local deadline = at.deadline_ms and tonumber(raw[at.deadline_ms])
    if deadline then
      call('ZREM', base .. 'e', id)
    end
    if not at.cost then
      running = count_down(base .. 'if', tenant)
      forget(base, id)
    elseif deadline and deadline <= now then
      running = count_down(base .. 'if', tenant)
      count_down(base .. 'n', tenant)
      overdue(base, id, read_job(id), now)
      late = late + 1
    else
      clock[b] = math.max(clock[b], vtime)
      local charge = tonumber(raw[at.cost]) * ratio(tenant)
      local total = 0
      for each = 1, #BANDS do
        total = total + (may(each) and SHARE[BANDS[each]] or 0)
      end
      for each = 1, #BANDS do
        if may(each) then
          lag[each] = lag[each] + charge * SHARE[BANDS[each]] / total
        end
      end
      lag[b] = lag[b] - charge
      vtime = vtime + charge / policy('weight', tenant, ARGV[4])

      local attempt = (at.attempt and tonumber(raw[at.attempt]) or 0) + 1
      local seq = tonumber(raw[at.seq]) + 1
      local changed = {'status', 'in_progress', 'started_ms', now, 'attempt', attempt, 'seq', seq}
      call('HSET', 'fb:job:' .. id, unpack(changed))
      for k = 1, #changed, 2 do
        local place = at[changed[k]]
        if place then
          raw[place] = tostring(changed[k + 1])
        else
          raw[#raw + 1] = changed[k]
          raw[#raw + 1] = tostring(changed[k + 1])
        end
      end
      call('ZADD', base .. 'l', now + lease_ms, id)
      call('HSET', base .. 'lo', id, string.format('%d|%.17g|%s', attempt, charge, owner))
      count_down(base .. 'n', tenant)
      if attempt > 1 then
        call('DEL', 'fb:job:' .. id .. ':text')
      end
      log_event(id, seq, 'in_progress', attempt)
      claims[#claims + 1] = id
      claims[#claims + 1] = raw
      wanted = wanted - 1
      room = b == #BANDS and room - 1 or room
    end
    call('ZREM', base .. 'o:' .. band, id)
    popped = popped + 1
    local more = call('EXISTS', list) == 1
    if more then
      call('ZADD', base .. 'a:' .. band, vtime, tenant)
    else
      call('ZREM', base .. 'a:' .. band, tenant)
      remember(base, band, tenant, vtime, clock[b])
    end
    if running >= cap then
      park(base, tenant)
      for each = 1, #BANDS do
        look(each)
      end
    elseif wanted > 0 or not more then
      look(b)
    end
  end
end

if popped > 0 then
  call('LPOP', mirror_of(base), popped)
end
if popped > 0 or balanced then
  local values = {}
  for b = 1, #BANDS do
    values[4 * b - 3], values[4 * b - 2] = STATE[b], clock[b]
    values[4 * b - 1], values[4 * b] = STATE[#BANDS + b], lag[b]
    if balanced then
      local k = 4 * #BANDS + 2 * b
      values[k - 1], values[k] = STATE[2 * #BANDS + b], 0
    end
  end
  call('HSET', base .. 's', unpack(values))
end
if may(1) or may(2) or may(3) then
  ring(base)
  claims[#claims + 1] = 1
elseif head[#BANDS] then
  ring(base, 'bell:batch')
end
return claims
