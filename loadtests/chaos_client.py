"""The client of the chaos run: traffic of several tenants, and its own ledger of what it was told.

Each submit carries an Idempotency-Key and is repeated until it is answered, whichever API process
or connection dies meanwhile. The ledger knows nothing of the broker.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtests.stack import request_body

#: Shares of jobs whose client follows the events, asks with `?wait=`, cancels.
FOLLOWED, AWAITED, CANCELLED = 0.25, 0.25, 0.12
_TIMEOUT = aiohttp.ClientTimeout(total=25)
_PAUSE_S = 0.2
_LOG_TRIES = 20
_ENDS = ("job.completed", "job.failed", "job.cancelled", "job.expired")
_TERMINAL = ("completed", "failed", "cancelled", "expired")
_PASSING = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(slots=True)
class Entry:
    """One job as its client knows it."""

    key: str
    tenant: str
    stream: bool
    id: str = ""
    cancel_asked: bool = False
    #: Every terminal state that was ever shown: a second, different one is a broken promise.
    ends: set[str] = field(default_factory=set)
    #: Sequence numbers a live reader got, in the order they came.
    followed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Ledger:
    entries: list[Entry] = field(default_factory=list)
    #: Submits whose connection broke before the answer, and were repeated.
    cut: int = 0
    #: Submits answered as a replay: the first one had been accepted although its answer was lost.
    replayed: int = 0
    refused: int = 0
    #: Clients that broke off: answers they could make nothing of.
    broken: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.id]


def fingerprint(job: dict[str, Any]) -> str:
    """What of a terminal job must never change."""
    kept = [job[name] for name in ("status", "attempt", "completed_at", "error", "output")]
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return f"{job['status']}:{digest[:16]}"


class Client:
    """All tenants' traffic, from one event loop."""

    def __init__(
        self, ports: list[int], secrets: dict[str, str], *, seed: int, max_attempts: int
    ) -> None:
        self.ledger = Ledger()
        self._ports = ports
        self._secrets = secrets
        self._random = random.Random(seed)
        self._seed = seed
        self._max_attempts = max_attempts
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # A connection per request: none is reused that an API took down with it.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._session is not None
        await self._session.close()

    # -- traffic -----------------------------------------------------------------------------------
    async def traffic(self, rate: float, stop: asyncio.Event) -> None:
        """New jobs at random moments, `rate` a second, until `stop`."""
        while not stop.is_set():
            self.new_job()
            await asyncio.sleep(self._random.expovariate(rate))

    def new_job(self) -> None:
        number = len(self.ledger.entries)
        tenant = self._random.choice(list(self._secrets))
        entry = Entry(
            key=f"chaos-{self._seed}-{number}", tenant=tenant, stream=self._random.random() < 0.5
        )
        self.ledger.entries.append(entry)
        body = request_body(f"job {number}", max_tokens=self._random.randint(5, 60))
        if entry.stream:
            body["stream"] = True
        task = asyncio.create_task(self._live(entry, body))
        self._tasks.add(task)
        task.add_done_callback(self._through)

    def _through(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.ledger.broken.append(repr(error))

    async def settled(self, timeout_s: float) -> int:
        """Wait for the clients of all jobs to be through; how many were not in time."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        return len(self._tasks)

    async def _live(self, entry: Entry, body: dict[str, Any]) -> None:
        fate, cancels = self._random.random(), self._random.random() < CANCELLED
        patience_s = self._random.uniform(0, 1.5)
        await self._submit(entry, body)
        if not entry.id:
            return
        if cancels:
            await asyncio.sleep(patience_s)
            entry.cancel_asked = True
            await self._ask(entry, "POST", f"/v1/jobs/{entry.id}/cancel")
        if fate < FOLLOWED:
            await self._follow(entry)
        elif fate < FOLLOWED + AWAITED:
            while (await self.read(entry, wait_s=10))["status"] not in (*_TERMINAL, "absent"):
                pass

    async def _submit(self, entry: Entry, body: dict[str, Any]) -> None:
        payload = {
            "endpoint": "/v1/chat/completions",
            "body": body,
            "max_attempts": self._max_attempts,
        }
        headers = {"Idempotency-Key": entry.key}
        status, answer, shown = await self._ask(
            entry, "POST", "/v1/jobs", json=payload, headers=headers
        )
        # 200: the job of a repeated submit has ended meanwhile.
        if status in (200, 202):
            entry.id = answer["id"]
            self.ledger.replayed += "Idempotent-Replayed" in shown
        else:
            self.ledger.refused += 1

    async def read(self, entry: Entry, *, wait_s: int = 0) -> dict[str, Any]:
        """The job as the API shows it; `status` is `absent` where there is none."""
        path = f"/v1/jobs/{entry.id}" + (f"?wait={wait_s}" if wait_s else "")
        status, job, _ = await self._ask(entry, "GET", path)
        if status != 200:
            return {"status": "absent"}
        if job["status"] in _TERMINAL:
            entry.ends.add(fingerprint(job))
        shown: dict[str, Any] = job
        return shown

    async def _follow(self, entry: Entry) -> None:
        """Read the events live to the last, going on with the cursor after each cut."""
        while True:
            last = entry.followed[-1] if entry.followed else 0
            try:
                async for event in self.events(entry, after=last):
                    entry.followed.append(event["seq"])
                    if event["type"] in _ENDS:
                        entry.ends.add(fingerprint(event["job"]))
                        return
            except _PASSING:
                pass
            await asyncio.sleep(_PAUSE_S)

    async def log(self, entry: Entry) -> list[dict[str, Any]]:
        """All events of a finished job, from the first; none when they can't be had."""
        for _ in range(_LOG_TRIES):
            try:
                return [event async for event in self.events(entry, after=0)]
            except _PASSING:
                await asyncio.sleep(_PAUSE_S)
        return []

    async def events(self, entry: Entry, *, after: int) -> AsyncIterator[dict[str, Any]]:
        assert self._session is not None
        url = f"{self._base()}/v1/jobs/{entry.id}/events"
        headers = self._headers(entry) | {"Last-Event-ID": str(after)}
        async with self._session.get(url, headers=headers) as response:
            if response.status >= 300:
                raise aiohttp.ClientError(f"answered {response.status}")
            async for line in response.content:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    # -- calls -------------------------------------------------------------------------------------
    def _base(self) -> str:
        return f"http://127.0.0.1:{self._random.choice(self._ports)}"

    def _headers(self, entry: Entry) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._secrets[entry.tenant]}"}

    async def _ask(
        self, entry: Entry, method: str, path: str, *, json: Any = None, headers: Any = None
    ) -> tuple[int, Any, Any]:
        """Ask until there is an answer that isn't "try again": status, body, headers."""
        assert self._session is not None
        sent = self._headers(entry) | (headers or {})
        while True:
            try:
                url = self._base() + path
                async with self._session.request(method, url, json=json, headers=sent) as response:
                    if response.status < 500 and response.status != 429:
                        return response.status, await response.json(), response.headers
            except aiohttp.ClientConnectorError:
                pass
            except _PASSING:
                self.ledger.cut += method == "POST" and path == "/v1/jobs"
            await asyncio.sleep(_PAUSE_S)
