"""Requests at random moments of a given rate, whatever the answers take: an open loop."""

from __future__ import annotations

import asyncio
import random
import time

from loadtests.harness import BenchError
from loadtests.http_load import Connection

#: Longest wait for the last answers.
_LAST_S = 20.0


async def paced(
    port: int, prepared: bytes, *, per_s: float, seconds: float, seed: int
) -> list[float]:
    """Seconds from the moment a request was due to its answer.

    Arrivals are a Poisson process, the same for the same seed. Each request has a connection to
    itself: one that is idle, or a new one. Raises `BenchError` for any answer but 200.
    """
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    idle: list[Connection] = []
    every: list[Connection] = []
    sent = 0
    failed: asyncio.Future[None] = loop.create_future()
    finished = asyncio.Event()
    due_of: dict[Connection, float] = {}

    def on_response(connection: Connection, status: int, body: bytes) -> None:
        latencies.append(time.perf_counter() - due_of[connection])
        idle.append(connection)
        if status != 200 and not failed.done():
            failed.set_exception(BenchError(f"answer {status}: {body[:300]!r}"))
        if len(latencies) == sent:
            finished.set()

    def on_lost(error: Exception) -> None:
        if not failed.done():
            failed.set_exception(error)

    async def send(due: float) -> None:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(
                lambda: Connection(on_response, on_lost), "127.0.0.1", port
            )
            every.append(connection)
        due_of[connection] = due
        connection.send(prepared)

    draw = random.Random(seed)
    due = time.perf_counter()
    end = due + seconds
    try:
        while (due := due + draw.expovariate(per_s)) < end and not failed.done():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent += 1
            finished.clear()
            await send(due)
        waiting = loop.create_task(_until(finished))
        await asyncio.wait({failed, waiting}, timeout=_LAST_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    finally:
        for connection in every:
            connection.close()
    if failed.done():
        failed.result()
    if len(latencies) < sent:
        raise BenchError(f"{sent - len(latencies)} of {sent} answers never came")
    return latencies


async def _until(event: asyncio.Event) -> None:
    await event.wait()
