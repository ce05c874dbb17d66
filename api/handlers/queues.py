"""`GET /v1/queues`: what the caller's tenant has in each model's queue; nothing of others."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

from api import keys
from broker.stats import TenantQueue


async def listing(request: web.Request) -> web.Response:
    app, tenant = request.app, request[keys.PRINCIPAL].tenant
    queue = app[keys.QUEUE]
    readings = (queue.tenant_queue(name, tenant) for name in app[keys.CATALOGUE])
    found = await asyncio.gather(*readings)
    body = orjson.dumps({"object": "list", "data": [_shown(each) for each in found]})
    return web.Response(body=body, content_type="application/json")


def _shown(queue: TenantQueue) -> dict[str, Any]:
    return {
        "object": "queue",
        "model": queue.queue,
        "mode": queue.mode,
        "priorities": {
            band.band.value: {"waiting": band.depth, "oldest_ms": band.oldest_ms}
            for band in queue.bands
        },
        "delayed": queue.delayed,
        "running": queue.in_flight,
        "jobs_per_s": round(queue.jobs_per_s, 3),
        "tokens_per_s": round(queue.tokens_per_s, 3),
    }
