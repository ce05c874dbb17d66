#!lua flags=allow-oom
-- Publishes a tenant's policy and lets it run where its new cap allows.
-- KEYS[1…] bases of all queues
-- ARGV[1] tenant  [2] default cap  [3] weight  [4] cap  [5] most waiting jobs; [3…5] absent: defaults

local tenant = ARGV[1]
if ARGV[3] then
  call('HSET', 'fb:policy:weight', tenant, ARGV[3])
  call('HSET', 'fb:policy:cap', tenant, ARGV[4])
  call('HSET', 'fb:policy:max_queued', tenant, ARGV[5])
else
  call('HDEL', 'fb:policy:weight', tenant)
  call('HDEL', 'fb:policy:cap', tenant)
  call('HDEL', 'fb:policy:max_queued', tenant)
end
for _, base in ipairs(KEYS) do
  unpark(base, tenant, tonumber(call('HGET', base .. 'if', tenant) or 0), ARGV[2])
end
return 1
