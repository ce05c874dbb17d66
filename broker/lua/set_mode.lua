#!lua flags=allow-oom
-- Stops and starts a queue.
-- KEYS[1] base `fb:{<queue>}:`
-- ARGV[1] paused | draining | running

local base, mode = KEYS[1], ARGV[1]
if mode == 'running' then
  call('HDEL', base .. 's', 'mode')
elseif mode == 'paused' or mode == 'draining' then
  call('HSET', base .. 's', 'mode', mode)
else
  return redis.error_reply('ERR bad mode')
end
call('SADD', 'fb:queues', mirror_of(base))
if mode ~= 'paused' then
  for _, band in ipairs(BANDS) do
    if call('EXISTS', base .. 'a:' .. band) == 1 then
      ring(base)
    end
  end
end
return 1
