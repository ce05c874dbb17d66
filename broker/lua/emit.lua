#!lua flags=allow-oom
-- Logs and publishes text of running attempts; each fenced by its attempt.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV    job id, attempt, start, text, job id, attempt, start, text, …
--         start: bytes of the attempt's text before this piece, or -1; what a repeat brings again
--         is cut off.
-- Returns the ids whose attempt was stale.

-- Events that a log keeps, about.
local EVENTS = 512

local base, stale = KEYS[1], {}
for k = 1, #ARGV, 4 do
  local id, attempt, start, text = ARGV[k], ARGV[k + 1], tonumber(ARGV[k + 2]), ARGV[k + 3]
  if read_lease(base, id) == tonumber(attempt) then
    local key = 'fb:job:' .. id
    if start >= 0 then
      text = string.sub(text, math.max(call('STRLEN', key .. ':text') - start, 0) + 1)
    end
    if text ~= '' then
      local seq = call('HINCRBY', key, 'seq', 1)
      local line = '{"seq":' .. seq .. ',"type":"job.delta","attempt":' .. attempt .. ',"text":'
        .. cjson.encode(text) .. '}'
      if call('RPUSH', key .. ':events', line) >= EVENTS * 5 / 4 then
        call('LTRIM', key .. ':events', -EVENTS, -1)
      end
      call('PUBLISH', 'fb:ev:' .. id, line)
      call('APPEND', key .. ':text', text)
    end
  else
    count_stale(base)
    stale[#stale + 1] = id
  end
end
return stale
