"""The fair broker: jobs in per-tenant priority queues on Redis, leased to workers and fenced.

The library (queue, scripts, leases, events) knows nothing of Celery; `transport` and `app` put it
under a Celery worker.
"""
