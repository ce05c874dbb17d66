"""The judge of the chaos run sees what it is there to see."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from loadtests.chaos import FULL, SENTINEL, SHORT
from loadtests.chaos_checks import attempt_fault, order_fault, text_fault
from loadtests.chaos_client import fingerprint
from loadtests.cut_proxy import Network, serve
from tests.conftest import free_port


def test_numbers_in_order() -> None:
    assert order_fault([1, 2, 3], 3) is None


@pytest.mark.parametrize(
    ("seqs", "last"),
    [([1, 3], 3), ([1, 2, 2, 3], 3), ([2, 1, 3], 3), ([1, 2], 3), ([1, 2, 3, 4], 3), ([], 1)],
)
def test_numbers_out_of_order(seqs: list[int], last: int) -> None:
    assert order_fault(seqs, last)


def _job(content: str, **more: Any) -> dict[str, Any]:
    output = {"choices": [{"message": {"content": content}}]}
    job = {"status": "completed", "attempt": 2, "completed_at": 5, "error": None, "output": output}
    return job | more


def _delta(text: str, attempt: int) -> dict[str, Any]:
    return {"type": "job.delta", "attempt": attempt, "text": text}


def test_only_the_last_attempts_text_is_the_output() -> None:
    events = [_delta("a", 1), _delta("b", 2), _delta("c", 2)]
    assert text_fault(events, _job("bc")) is None
    assert text_fault(events, _job("abc"))
    assert text_fault(events[:2], _job("bc"))
    assert text_fault([], _job("bc", status="cancelled")) is None


def test_text_of_a_stale_attempt_shows() -> None:
    assert attempt_fault([_delta("a", 1), _delta("b", 2)]) is None
    assert attempt_fault([_delta("b", 2), _delta("a", 1)])


def test_a_second_end_differs() -> None:
    assert fingerprint(_job("x")) == fingerprint(_job("x"))
    changed = [_job("y"), _job("x", status="failed"), _job("x", attempt=3)]
    assert fingerprint(_job("x")) not in map(fingerprint, changed)


def test_a_seed_gives_one_order_of_all_faults() -> None:
    assert FULL.worker_kills >= 100
    assert FULL.redis_kills >= 10
    assert SENTINEL.failovers >= 10
    assert SENTINEL.redis_kills + SENTINEL.cuts + SENTINEL.demotions == 0
    for plan in (FULL, SHORT, SENTINEL):
        order = plan.order(random.Random(7))
        assert order == plan.order(random.Random(7))
        assert len(order) == plan.faults


async def test_the_proxy_joins_two_ports() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)

    target = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = free_port()
    proxy = asyncio.create_task(serve(port, target.sockets[0].getsockname()[1], Network()))
    try:
        reader, writer = await connect(port)
        writer.write(b"through\n")
        assert await reader.readline() == b"through\n"
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    finally:
        proxy.cancel()
        target.close()
        await target.wait_closed()
