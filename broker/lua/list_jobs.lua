#!lua flags=no-writes
-- Reads part of a tenant's jobs, without bodies and outputs.
-- KEYS[1] the tenant's index
-- ARGV[1] status  [2] model  [3] band: wanted values, or empty  [4] created at or after (ms)
-- ARGV[5] id to go on after, or empty  [6] most jobs  [7] most ids to look at  [8] 1: newest first
-- Returns {id to go on after, or empty at the end; then id, fields and values, …} | {} when ARGV[5]
-- isn't in the index.

local FIELDS = {'tenant', 'key_id', 'model', 'endpoint', 'band', 'status', 'cost', 'metadata',
  'stream', 'attempt', 'max_attempts', 'created_ms', 'started_ms', 'finished_ms', 'result_ttl_s',
  'request_id', 'seq', 'error', 'usage', 'deadline_ms', 'execution_timeout_ms', 'refunds',
  'erased_ms'}
local newest_first = ARGV[8] == '1'
local wanted, looks, since = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[4])
local start = 0
if ARGV[5] ~= '' then
  local rank = call(newest_first and 'ZREVRANK' or 'ZRANK', KEYS[1], ARGV[5])
  if not rank then
    return {}
  end
  start = rank + 1
elseif since > 0 and not newest_first then
  start = call('ZCOUNT', KEYS[1], '-inf', '(' .. ARGV[4])
end

local found = {''}
local ids = call(newest_first and 'ZREVRANGE' or 'ZRANGE', KEYS[1], start, start + looks - 1)
for position, id in ipairs(ids) do
  local raw = call('HMGET', 'fb:job:' .. id, unpack(FIELDS))
  if raw[1] then
    if newest_first and tonumber(raw[12]) < since then
      return found
    end
    if (ARGV[1] == '' or ARGV[1] == raw[6]) and (ARGV[2] == '' or ARGV[2] == raw[3])
        and (ARGV[3] == '' or ARGV[3] == raw[5]) and tonumber(raw[12]) >= since then
      local fields = {}
      for k, name in ipairs(FIELDS) do
        if raw[k] then
          fields[#fields + 1] = name
          fields[#fields + 1] = raw[k]
        end
      end
      found[#found + 1] = id
      found[#found + 1] = fields
      wanted = wanted - 1
      if wanted == 0 then
        found[1] = id
        return found
      end
    end
  end
  if position == looks then
    found[1] = id
  end
end
return found
