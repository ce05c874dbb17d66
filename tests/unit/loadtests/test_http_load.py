"""The load generator counts what it should, against a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtests.harness import BenchError
from loadtests.http_load import Load, all_at_once, closed_loop, each_once, request

Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[int]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[TestServer] = []

    async def start(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> int:
        app = web.Application()
        app.router.add_post("/", handler)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        assert server.port is not None
        return server.port

    yield start
    for server in servers:
        await server.close()


async def run(port: int, body: object = None) -> Load:
    prepared = request("POST", "/", port=port, body=body)
    return await closed_loop(
        port, prepared, connections=3, warmup_s=0.02, window_s=0.1, expected=202
    )


async def test_the_window_counts_answers_and_their_latency(serve: Serve) -> None:
    seen = []

    async def handler(http: web.Request) -> web.Response:
        seen.append(await http.json())
        return web.json_response({"id": "x"}, status=202)

    load = await run(await serve(handler), body={"a": 1})
    assert 0 < len(load.latencies_s) <= load.statuses[202] <= len(seen)
    assert all(body == {"a": 1} for body in seen)
    assert load.per_second == pytest.approx(len(load.latencies_s) / load.seconds)
    assert 0 < load.latency_ms(50) <= load.latency_ms(100) < 1000 * load.seconds


async def test_one_unexpected_answer_spoils_the_run(serve: Serve) -> None:
    numbers = itertools.count()

    async def handler(http: web.Request) -> web.Response:
        return web.Response(status=429 if next(numbers) == 5 else 202, text="busy")

    with pytest.raises(BenchError, match="429"):
        await run(await serve(handler))


async def test_a_server_that_hangs_up_is_an_error(serve: Serve) -> None:
    async def handler(http: web.Request) -> web.Response:
        response = web.Response(status=202)
        response.force_close()
        return response

    with pytest.raises(BenchError, match="closed a connection"):
        await run(await serve(handler))


async def test_an_answer_in_pieces_is_put_together(serve: Serve) -> None:
    async def handler(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "6"})
        await response.prepare(http)
        for piece in (b"abc", b"def"):
            await response.write(piece)
            await asyncio.sleep(0.01)  # two packets, not one
        return response

    port = await serve(handler)
    answers = await all_at_once(port, [request("POST", "/", port=port)], timeout_s=5)
    assert [answer.body for answer in answers] == [b"abcdef"]


async def test_all_at_once_keeps_the_order_of_the_requests(serve: Serve) -> None:
    together = asyncio.Barrier(5)

    async def handler(http: web.Request) -> web.Response:
        number = await http.json()
        await together.wait()  # none is answered before all have come
        return web.json_response(number)

    port = await serve(handler)
    prepared = [request("POST", "/", port=port, body=number) for number in range(5)]
    answers = await all_at_once(port, prepared, timeout_s=5)
    assert [answer.body for answer in answers] == [b"0", b"1", b"2", b"3", b"4"]
    assert {answer.status for answer in answers} == {200}


async def test_all_at_once_gives_up_in_time(serve: Serve) -> None:
    stuck = asyncio.Event()

    async def handler(http: web.Request) -> web.Response:
        await stuck.wait()
        return web.Response()

    port = await serve(handler)
    with pytest.raises(BenchError, match=r"within 0\.05 s"):
        await all_at_once(port, [request("POST", "/", port=port)], timeout_s=0.05)
    stuck.set()


async def test_each_request_is_sent_once(serve: Serve) -> None:
    seen: list[int] = []
    most = at_once = 0

    async def handler(http: web.Request) -> web.Response:
        nonlocal most, at_once
        at_once += 1
        most = max(most, at_once)
        seen.append((await http.json())["number"])
        at_once -= 1
        return web.json_response({"number": seen[-1]})

    port = await serve(handler)
    prepared = [request("POST", "/", port=port, body={"number": number}) for number in range(20)]
    answers = await each_once(port, prepared, connections=3, timeout_s=10)
    assert sorted(seen) == list(range(20))
    assert most <= 3
    assert sorted(json.loads(answer.body)["number"] for answer in answers) == list(range(20))
    assert {answer.status for answer in answers} == {200}


async def test_each_once_says_when_time_is_up(serve: Serve) -> None:
    async def handler(http: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    port = await serve(handler)
    with pytest.raises(BenchError, match="within"):
        await each_once(port, [request("POST", "/", port=port)], connections=1, timeout_s=0.05)
