"""For those who run it: is it alive, is it ready, what do its gauges say."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import hdrs, web

from api import keys
from api.metrics import CONTENT_TYPE
from broker.errors import BrokerError


async def healthz(_: web.Request) -> web.Response:
    """The process answers; says nothing of what it depends on."""
    return web.Response(body=b'{"status":"ok"}', content_type="application/json")


async def readyz(request: web.Request) -> web.Response:
    """200 when jobs can be accepted and run, else 503 with what is missing."""
    app = request.app
    missing: list[str] = []
    if not app[keys.ACCOUNTS_READY]():
        missing.append("accounts")
    models: dict[str, dict[str, Any]] = {
        name: {"ready_workers": 0, "loading_workers": 0} for name in app[keys.CATALOGUE]
    }
    try:
        await app[keys.QUEUE].ping()
        workers = await app[keys.QUEUE].workers()
    except BrokerError:
        missing.append("queue")
        workers = []
    for worker in workers:
        counts = models.get(worker.queue)
        state = "loading" if worker.is_starting else worker.state
        if counts is not None and f"{state}_workers" in counts:
            counts[f"{state}_workers"] += 1
    missing += [f"model:{name}" for name, counts in models.items() if not counts["ready_workers"]]
    body = {"status": "unready" if missing else "ready", "missing": missing, "models": models}
    headers: dict[str, str] = {hdrs.CONTENT_TYPE: "application/json"}
    if missing:
        headers[hdrs.RETRY_AFTER] = "1"
        headers["retry-after-ms"] = "1000"
    return web.Response(status=503 if missing else 200, body=orjson.dumps(body), headers=headers)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text; on the main port for admins, on its own listener for the scraper."""
    app = request.app
    models = list(app[keys.CATALOGUE].keys())
    body = await app[keys.METRICS].render(app[keys.QUEUE], models)
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})
