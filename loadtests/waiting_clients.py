"""Many clients in one process, each on a connection of its own: submit a job, wait for its result.

Raw protocols instead of an HTTP library, so that one core carries thousands of them beside the
servers. Speaks lines of JSON on stdin and stdout, see `main`. Usage:
`python -m loadtests.waiting_clients`, with the plan as the first line.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, cast

import uvloop

from loadtests.http_load import request
from loadtests.lab import pin_load

Way = Literal["stream", "poll"]

#: Longest wait the API grants to one long poll.
_POLL_S = 60
#: Clients of one process that connect and submit at the same time: fewer than a server's backlog.
_ARRIVING = 128
_TERMINAL = frozenset({"completed", "failed", "cancelled", "expired"})


class Answers:
    """Incremental reader of HTTP/1.1 answers: heads, and parts of bodies as they come."""

    def __init__(self) -> None:
        self._buffer = b""
        #: Bytes of the present part of the body still to come; None before a head.
        self._left: int | None = None
        self._chunked = False

    def feed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """`("head", status)`, `("body", bytes)`… and `("end", None)` for each answer."""
        self._buffer += data
        while True:
            if self._left is None:
                if (status := self._take_head()) is None:
                    return
                yield "head", status
            elif self._left > 0:
                part, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
                if not part:
                    return
                self._left -= len(part)
                yield "body", part
            elif not self._chunked:
                self._left = None
                yield "end", None
            else:
                size = self._take_chunk_size()
                if size is None:
                    return
                if size == 0:
                    self._left = None
                    yield "end", None
                else:
                    self._left = size

    def _take_head(self) -> int | None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        self._buffer = rest
        lower = head.lower()
        self._chunked = b"\r\ntransfer-encoding: chunked" in lower
        _, named, after = lower.partition(b"\r\ncontent-length:")
        self._left = int(after.partition(b"\r\n")[0]) if named else 0
        return int(head[9:12])

    def _take_chunk_size(self) -> int | None:
        # The line break that ends the chunk before is skipped with it.
        start = 2 if self._buffer.startswith(b"\r\n") else 0
        line_end = self._buffer.find(b"\r\n", start)
        if line_end < 0:
            return None
        size = int(self._buffer[start:line_end], 16)
        end = line_end + (4 if size == 0 else 2)
        if len(self._buffer) < end:
            return None
        self._buffer = self._buffer[end:]
        return size


class WaitingClient(asyncio.Protocol):
    """One client: connects, submits, waits; keeps the connection after the result."""

    __slots__ = (
        "_answers",
        "_body",
        "_crowd",
        "_event",
        "_seq",
        "_state",
        "_transport",
        "_way",
        "job_id",
        "received_ms",
        "submitted",
    )

    def __init__(self, crowd: Crowd, way: Way) -> None:
        self._crowd = crowd
        self._way = way
        self._answers = Answers()
        self._state = "submitting"
        self._body = b""
        self._event = b""
        self._seq = 0
        self.job_id = ""
        #: The job was taken, or never will be.
        self.submitted = asyncio.Event()
        #: Unix time at which the result was here; 0 before.
        self.received_ms = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._crowd.submits[self._way])

    def data_received(self, data: bytes) -> None:
        now_ms = time.time() * 1000
        for kind, value in self._answers.feed(data):
            if self._state in ("finished", "failed"):
                if kind == "head" or (kind == "body" and b"event: job." in value):
                    self._crowd.problems["more after the result"] += 1
            elif kind == "head" and value >= 300:
                self._fail(f"answer {value}")
            elif kind == "body" and self._state == "streaming":
                self._take_events(value, now_ms)
            elif kind == "body":
                self._body += value
            elif kind == "end":
                body, self._body = self._body, b""
                self._take_answer(body, now_ms)
            elif self._state == "opening" and self._way == "stream":
                self._state = "streaming"

    def _take_answer(self, body: bytes, now_ms: float) -> None:
        if self._state == "streaming":
            self._fail("stream ended before the result")
            return
        job = json.loads(body)
        if self._state == "submitting":
            self.job_id = job["id"]
            self._state = "opening"
            self.submitted.set()
            self._crowd.accepted()
        if job["status"] in _TERMINAL:
            self._finish(job["status"], now_ms)
        else:
            self._transport.write(self._crowd.wait_request(self._way, self.job_id))

    def _take_events(self, part: bytes, now_ms: float) -> None:
        *events, self._event = (self._event + part).split(b"\n\n")
        for event in events:
            fields = dict(line.partition(b": ")[::2] for line in event.split(b"\n"))
            if b"id" not in fields:
                continue
            seq, name = int(fields[b"id"]), fields[b"event"].decode().removeprefix("job.")
            if seq != self._seq + 1:
                repeated = seq <= self._seq
                self._crowd.problems["event repeated" if repeated else "event missing"] += 1
            self._seq = seq
            if name in _TERMINAL:
                self._finish(name, now_ms)

    def _finish(self, status: str, now_ms: float) -> None:
        if status != "completed":
            self._fail(f"job {status}")
            return
        self._state = "finished"
        self.received_ms = now_ms
        self._crowd.ended()

    def _fail(self, reason: str) -> None:
        self._state = "failed"
        self._crowd.problems[reason] += 1
        self.submitted.set()
        self._crowd.ended()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state not in ("finished", "failed"):
            self._fail("connection lost")

    def close(self) -> None:
        self._transport.close()


class Crowd:
    """The clients of this process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._port: int = plan["port"]
        self._headers = {"Authorization": f"Bearer {plan['key']}"}
        self.submits: dict[Way, bytes] = {
            way: request(
                "POST", "/v1/jobs", port=self._port, body=plan["bodies"][way], headers=self._headers
            )
            for way in ("stream", "poll")
        }
        self.clients: list[WaitingClient] = []
        #: What went wrong → how often.
        self.problems: Counter[str] = Counter()
        self._accepted = self._ended = 0
        self._changed = asyncio.Event()

    def wait_request(self, way: Way, job_id: str) -> bytes:
        path = (
            f"/v1/jobs/{job_id}/events" if way == "stream" else f"/v1/jobs/{job_id}?wait={_POLL_S}"
        )
        return request("GET", path, port=self._port, headers=self._headers)

    def accepted(self) -> None:
        self._accepted += 1
        self._changed.set()

    def ended(self) -> None:
        self._ended += 1
        self._changed.set()

    async def open(self, way: Way, count: int, within_s: float) -> dict[str, Any]:
        """`count` more clients, until each has its job accepted or has failed."""
        loop = asyncio.get_running_loop()
        turns = asyncio.Semaphore(_ARRIVING)

        async def one() -> None:
            async with turns:
                try:
                    _, client = await loop.create_connection(
                        lambda: WaitingClient(self, way), "127.0.0.1", self._port
                    )
                except OSError as error:
                    self.problems[f"not connected: {type(error).__name__}"] += 1
                    self.ended()
                else:
                    self.clients.append(client)
                    await client.submitted.wait()

        target = len(self.clients) + count
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(one() for _ in range(count)))
        await self._until(lambda: self._accepted + self.failed >= target, within_s)
        return {"accepted": self._accepted, "problems": self.problems}

    async def collect(self, within_s: float) -> dict[str, Any]:
        """Every client's job and the moment its result was here (0: never)."""
        await self._until(lambda: self._ended >= len(self.clients), within_s)
        results = [[each.job_id, each.received_ms] for each in self.clients]
        return {"results": results, "problems": self.problems}

    def close(self) -> dict[str, Any]:
        for client in self.clients:
            client.close()
        return {"closed": len(self.clients)}

    @property
    def failed(self) -> int:
        """Clients that ended without a result."""
        return self._ended - sum(client.received_ms > 0 for client in self.clients)

    async def _until(self, condition: Any, within_s: float) -> None:
        """Waits for a condition; what isn't there in time shows in the counts."""
        deadline = time.monotonic() + within_s
        while not condition() and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                continue


async def main() -> None:
    """First line: the plan `{port, key, bodies: {stream, poll}}`. Then commands, one answer each.

    `{"open": way, "clients": n, "within_s": s}`, `{"collect": true, "within_s": s}`, and
    `{"close": true}`, after which the process ends.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pin_load()
    loop = asyncio.get_running_loop()

    async def line() -> dict[str, Any]:
        told = await loop.run_in_executor(None, sys.stdin.readline)
        return dict(json.loads(told)) if told else {"close": True}

    crowd = Crowd(await line())
    while True:
        command = await line()
        if "open" in command:
            answer = await crowd.open(command["open"], command["clients"], command["within_s"])
        elif "collect" in command:
            answer = await crowd.collect(command["within_s"])
        else:
            answer = crowd.close()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if "close" in command:
            return


if __name__ == "__main__":
    uvloop.run(main())
