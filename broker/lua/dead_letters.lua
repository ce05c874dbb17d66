#!lua flags=no-writes
-- Reads dead letters, newest first.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] tenant, or empty  [2] job id, or empty  [3] letter to go on after, or empty
-- ARGV[4] most letters
-- Returns per letter: letter, job id, tenant, code, attempt, when (ms), and of the record, while it
-- lives, {endpoint, band, error}, else {}.

local found, most = {}, tonumber(ARGV[4])
local after = ARGV[3] == '' and '+' or '(' .. ARGV[3]
local looks = (ARGV[1] == '' and ARGV[2] == '') and most or DEAD_LETTERS
for _, entry in ipairs(call('XREVRANGE', KEYS[1] .. 'dead', after, '-', 'COUNT', looks)) do
  local field = entry[2]
  local id, tenant = field[2], field[4]
  if most > 0 and (ARGV[1] == '' or ARGV[1] == tenant) and (ARGV[2] == '' or ARGV[2] == id) then
    local record = call('HMGET', 'fb:job:' .. id, 'endpoint', 'band', 'error')
    found[#found + 1] = {entry[1], id, tenant, field[6], tonumber(field[8]), tonumber(field[10]),
      record[1] and record or {}}
    most = most - 1
  end
end
return found
