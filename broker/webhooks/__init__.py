"""Webhooks: what is told to whom, signed how, sent when; and the durable schedule of it in Redis.

`outbox` holds what happened, `events` makes the bytes of it, `store` keeps endpoints and
deliveries; `urls`, `signing` and `schedule` are the rules. Sending is the workers' part
(`workers/webhooks`), managing endpoints the API's (`api/accounts/webhooks.py`).
"""
