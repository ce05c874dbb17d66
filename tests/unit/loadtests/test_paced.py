"""Requests of an open loop against a small server."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtests.harness import BenchError
from loadtests.http_load import request
from loadtests.paced import paced


@pytest.mark.parametrize("status", [200, 500])
async def test_latency_counts_from_the_moment_a_request_was_due(status: int) -> None:
    seen = 0

    async def slow(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        await asyncio.sleep(0.05)
        return web.json_response({}, status=status)

    app = web.Application()
    app.router.add_get("/", slow)
    async with TestServer(app) as server:
        assert server.port is not None
        load = paced(
            server.port, request("GET", "/", port=server.port), per_s=100, seconds=0.3, seed=1
        )
        if status == 500:
            with pytest.raises(BenchError, match="answer 500"):
                await load
            return
        latencies = await load
    # About 30; one after another they would have been 6.
    assert len(latencies) == seen > 12
    assert min(latencies) >= 0.05
