#!lua flags=allow-oom
-- Leaves word of something that is no job's end for the webhook worker, where anybody wants it.
-- KEYS[1] endpoints of the tenant
-- ARGV[1] the event, as JSON
-- Returns 1: it is in the outbox, or the outbox is full | 0: the tenant has no endpoints.

if call('EXISTS', KEYS[1]) == 0 then
  return 0
end
post(ARGV[1])
return 1
