"""Sends webhooks: a Celery worker of its own, so that a slow receiver holds up no inference.

`courier` makes events into deliveries and hands out those that are due, `sender` makes the one HTTP
request, `guard` sees to it that it only goes to public addresses, `process` puts it together.
"""
