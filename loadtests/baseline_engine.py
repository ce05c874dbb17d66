"""Baseline of `loadtests.gateway`: the simulated engine right behind aiohttp, and nothing between.

The same engine with the same settings as in a worker. No authentication, queue, limits or record.
Usage: `python -m loadtests.baseline_engine PORT STEP_MS SLOTS`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from uuid import uuid4

import orjson
import uvloop
from aiohttp import web

from config import catalogue
from config.settings import Simulated
from loadtests.stack import MODEL
from workers.engine import EngineRequest
from workers.engines.simulated import SimulatedEngine


def make_app(engine: SimulatedEngine) -> web.Application:
    async def chat(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        wanted = EngineRequest(id=uuid4().hex, endpoint="/v1/chat/completions", body=body)
        result = await asyncio.wrap_future(engine.submit(wanted))
        answer = {
            "id": f"chatcmpl-{wanted.id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": result.text},
                    "finish_reason": result.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": result.usage.input_tokens,
                "completion_tokens": result.usage.output_tokens,
                "total_tokens": result.usage.input_tokens + result.usage.output_tokens,
            },
            "system_fingerprint": "simulated",
        }
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    return app


def main() -> None:
    settings = Simulated(
        step_ms=float(sys.argv[2]),
        step_ms_per_sequence=0,
        prefill_ms_per_token=0,
        capacity=int(sys.argv[3]),
    )
    engine = SimulatedEngine(catalogue.load()[MODEL], settings)
    engine.start()
    uvloop.install()
    try:
        web.run_app(make_app(engine), host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
