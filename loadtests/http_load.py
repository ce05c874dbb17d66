"""A lean HTTP/1.1 keep-alive client for load: prepared bytes out, status and length in.

One process of it must outrun any server measured with it; `loadtests.submit` shows that by
measuring a constant answer as well.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from loadtests.harness import BenchError, percentile

OnResponse = Callable[["Connection", int, bytes], None]


def request(
    method: str, path: str, *, port: int, body: Any = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of one request with a JSON body."""
    payload = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


class Connection(asyncio.Protocol):
    """One request at a time; `on_response` is called with status and body."""

    def __init__(self, on_response: OnResponse, on_lost: Callable[[Exception], None]) -> None:
        self._on_response = on_response
        self._on_lost = on_lost
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's isn't a subclass

    def send(self, prepared: bytes) -> None:
        assert self._transport is not None
        self.sent_at = time.perf_counter()
        self._transport.write(prepared)

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._buffer[:head_end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            self._fail(BenchError(f"an answer without a length: {head[:200]!r}"))
            return
        line_end = head.find(b"\r\n", at + 2)
        length = int(head[at + 17 : line_end if line_end > 0 else None])
        end = head_end + 4 + length
        if len(self._buffer) < end:
            return
        body, self._buffer = self._buffer[head_end + 4 : end], self._buffer[end:]
        self._on_response(self, int(head[9:12]), body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._fail(BenchError(f"the server closed a connection ({exc or 'end of file'})"))

    def _fail(self, error: Exception) -> None:
        self.close()
        self._on_lost(error)


@dataclass(kw_only=True, slots=True)
class Load:
    """What was seen in the window of a closed-loop load."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    #: CPU time of the generator inside the window.
    generator_s: float = 0.0

    @property
    def generator_busy(self) -> float:
        """Share of the window the generator was computing; near 1 it was the limit."""
        return self.generator_s / self.seconds

    @property
    def per_second(self) -> float:
        return len(self.latencies_s) / self.seconds

    def latency_ms(self, percent: float) -> float:
        return percentile(self.latencies_s, percent) * 1000


async def closed_loop(
    port: int,
    prepared: bytes,
    *,
    connections: int,
    warmup_s: float,
    window_s: float,
    expected: int,
) -> Load:
    """Keep one request in flight on each connection; count what ends inside the window.

    Raises `BenchError` when any answer has another status than `expected`.
    """
    load = Load()
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    counting = False
    body_of_other = b""

    def on_response(connection: Connection, status: int, body: bytes) -> None:
        nonlocal body_of_other
        load.statuses[status] += 1
        if status != expected:
            body_of_other = body
        if counting:
            load.latencies_s.append(time.perf_counter() - connection.sent_at)
        connection.send(prepared)

    def on_lost(error: Exception) -> None:
        if not failed.done():
            failed.set_exception(error)

    open_ones: list[Connection] = []
    try:
        for _ in range(connections):
            _, connection = await loop.create_connection(
                lambda: Connection(on_response, on_lost), "127.0.0.1", port
            )
            open_ones.append(connection)
            connection.send(prepared)
        await asyncio.wait([failed], timeout=warmup_s)
        counting, began, cpu_began = True, time.perf_counter(), time.process_time()
        await asyncio.wait([failed], timeout=window_s)
        counting, load.seconds = False, time.perf_counter() - began
        load.generator_s = time.process_time() - cpu_began
    finally:
        for connection in open_ones:
            connection.close()
    if failed.done():
        failed.result()
    if set(load.statuses) != {expected}:
        raise BenchError(f"answers were {dict(load.statuses)}, such as {body_of_other[:300]!r}")
    return load


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    status: int
    body: bytes
    latency_s: float


async def all_at_once(port: int, prepared: Sequence[bytes], *, timeout_s: float) -> list[Answer]:
    """Send each request on a connection of its own, all at the same time; answers in order."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[Answer]] = [loop.create_future() for _ in prepared]
    open_ones: list[Connection] = []

    def connection_for(answer: asyncio.Future[Answer]) -> Connection:
        def on_response(connection: Connection, status: int, body: bytes) -> None:
            latency_s = time.perf_counter() - connection.sent_at
            answer.set_result(Answer(status=status, body=body, latency_s=latency_s))

        def on_lost(error: Exception) -> None:
            if not answer.done():
                answer.set_exception(error)

        return Connection(on_response, on_lost)

    try:
        for answer in waiting:
            _, connection = await loop.create_connection(
                lambda answer=answer: connection_for(answer),  # type: ignore[misc]
                "127.0.0.1",
                port,
            )
            open_ones.append(connection)
        for connection, payload in zip(open_ones, prepared, strict=True):
            connection.send(payload)
        async with asyncio.timeout(timeout_s):
            return list(await asyncio.gather(*waiting))
    except TimeoutError:
        raise BenchError(f"not all answers came within {timeout_s:g} s") from None
    finally:
        for connection in open_ones:
            connection.close()


async def each_once(
    port: int, prepared: Sequence[bytes], *, connections: int, timeout_s: float
) -> list[Answer]:
    """Send each request once, one at a time on each of the connections; answers as they came.

    Raises `BenchError` when a connection is lost or time is up.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    left = iter(prepared)
    answers: list[Answer] = []
    open_ones: list[Connection] = []

    def send_next(connection: Connection) -> None:
        payload = next(left, None)
        if payload is not None:
            connection.send(payload)

    def on_response(connection: Connection, status: int, body: bytes) -> None:
        latency_s = time.perf_counter() - connection.sent_at
        answers.append(Answer(status=status, body=body, latency_s=latency_s))
        if len(answers) < len(prepared):
            send_next(connection)
        elif not done.done():
            done.set_result(None)

    def on_lost(error: Exception) -> None:
        if not done.done():
            done.set_exception(error)

    try:
        for _ in range(connections):
            _, connection = await loop.create_connection(
                lambda: Connection(on_response, on_lost), "127.0.0.1", port
            )
            open_ones.append(connection)
        for connection in open_ones:
            send_next(connection)
        async with asyncio.timeout(timeout_s):
            await done
        return answers
    except TimeoutError:
        raise BenchError(f"not all answers came within {timeout_s:g} s") from None
    finally:
        for connection in open_ones:
            connection.close()
