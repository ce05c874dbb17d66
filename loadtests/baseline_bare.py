"""Ceiling of `loadtests.submit`: bare aiohttp on uvloop around one async script call.

No authentication, no validation, no limits. `/constant` answers without Redis and shows what
server and load generator can do at most. Usage: `python -m loadtests.baseline_bare PORT URL`.
"""

from __future__ import annotations

import sys
import time

import orjson
import redis.asyncio
import uvloop
from aiohttp import web

from broker.jobs import new_job_id

_SCRIPT = """
if redis.call('HSETNX', KEYS[1], 'status', 'queued') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'tenant', ARGV[1], 'created', ARGV[2], 'body', ARGV[3])
redis.call('RPUSH', KEYS[2], ARGV[4])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[4])
return 1
"""


def make_app(url: str) -> web.Application:
    client = redis.asyncio.Redis.from_url(url)
    script = client.register_script(_SCRIPT)

    async def submit(request: web.Request) -> web.Response:
        body = await request.read()
        job_id = new_job_id()
        now_ms = time.time_ns() // 1_000_000
        await script(keys=[f"job:{job_id}", "queue", "age"], args=["t", now_ms, body, job_id])
        answer = orjson.dumps({"id": job_id, "status": "queued"})
        return web.Response(body=answer, status=202, content_type="application/json")

    async def constant(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"{}", status=202, content_type="application/json")

    app = web.Application()
    app.router.add_post("/submit", submit)
    app.router.add_post("/constant", constant)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(make_app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
