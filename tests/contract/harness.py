"""One shape for all implementations of the queue, so that the same tests run on each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import redis

from broker.connections import connect, connect_async
from broker.drain import Drain
from broker.jobs import Claim, Event, NewJob, Outcome, Status, Usage
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.policies import TenantPolicy
from broker.queue import JobQueue
from broker.redis_queue import AsyncRedisQueue, RedisQueue
from broker.usage import HOUR_MS
from config.settings import Queue as QueueSettings
from config.settings import Redis as RedisSettings

MODEL = "llm"
LEASE_MS = 10_000


class ManualClock:
    """Milliseconds that pass when told to, and one at each look (so that no two moments tie)."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


class OverLoop:
    """A queue of coroutines, called from a thread: each call runs on a loop of its own thread."""

    def __init__(self, queue: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._queue = queue
        self._loop = loop

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._queue, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(method(*args, **kwargs), self._loop).result(30)

        return call


@dataclass
class Harness:
    """A queue under test and the means to look behind it."""

    queue: JobQueue
    #: Lets time pass for leases, delays and lifetimes.
    advance: Callable[[int], None]
    #: The queue's own clock (ms).
    now: Callable[[], int]
    #: The Redis behind it; None in memory.
    client: redis.Redis | None = None

    def submit(self, tenant: str = "acme", **fields: Any) -> str:
        job = new_job(tenant, **fields)
        self.queue.enqueue(job)
        return job.id

    def claim(
        self, limit: int = 1, owner: str = "w1", *, batch_room: int | None = None
    ) -> list[Claim]:
        return self.queue.claim(MODEL, owner, limit=limit, batch_room=batch_room)

    def claim_one(self, owner: str = "w1") -> Claim:
        (claim,) = self.claim(1, owner)
        return claim

    def finish(self, claim: Claim, tokens: int | None = None) -> bool:
        usage = Usage(input_tokens=claim.job.cost if tokens is None else tokens)
        outcome = Outcome(status=Status.COMPLETED, output=b'{"ok":true}', usage=usage)
        return self.queue.complete(claim, outcome)

    def status(self, job_id: str) -> Status:
        return self.queue.get(job_id).status

    def log(self, job_id: str) -> list[Event]:
        return self.queue.events(job_id)[0]


def new_job(tenant: str = "acme", **fields: Any) -> NewJob:
    values: dict[str, Any] = {
        "model": MODEL,
        "endpoint": "/v1/chat/completions",
        "body": b'{"messages":[]}',
        "cost": 100,
        **fields,
    }
    return NewJob(tenant=tenant, **values)


def policy(**fields: Any) -> TenantPolicy:
    return TenantPolicy(**fields)


def settings(**fields: Any) -> QueueSettings:
    return QueueSettings(**{"lease_ttl_s": LEASE_MS / 1000, **fields})


def shift_redis_time(client: redis.Redis, milliseconds: int) -> None:
    """Let time pass by moving every deadline nearer: nothing in a test waits for a real clock."""
    for key in client.scan_iter("fb:*"):
        kind = key.rsplit(b":", 1)[-1]
        if kind in (b"l", b"d", b"e") or b"}:o:" in key:
            for member, score in client.zrange(key, 0, -1, withscores=True):
                client.zadd(key, {member: score - milliseconds})
        elif key.startswith(b"fb:{") and kind == b"s":
            _shift_drains(client, key, milliseconds)
        elif key.startswith(b"fb:limit:"):
            for name, at in client.hgetall(key).items():
                client.hset(key, name, repr(float(at) - milliseconds))
        elif key.startswith(b"fb:job:") and key.count(b":") == 2:
            times = client.hmget(key, "deadline_ms", "queued_ms", "created_ms", "started_ms")
            if times[0]:
                client.hincrby(key, "deadline_ms", -milliseconds)
            # Since when it waits; when it was created stays as it was told.
            client.hset(key, "queued_ms", int(times[1] or times[2]) - milliseconds)
            if times[3]:
                client.hincrby(key, "started_ms", -milliseconds)
        left = client.pttl(key)
        if left > 0 and b":tenant:" not in key:
            client.pexpire(key, max(left - milliseconds, 0))
    _shift_usage(client, milliseconds // HOUR_MS)


def _shift_usage(client: redis.Redis, hours: int) -> None:
    """Whole hours only: within one nothing is told apart."""
    for key in list(client.scan_iter("fb:usage:*")) if hours else ():
        tenant = key.decode().split(":")[2]
        sums, left = client.hgetall(key), client.pttl(key)
        client.delete(key)
        for field, each in sums.items():
            hour, model = field.split(b"|", 1)
            earlier = int(hour) - hours
            there = f"fb:usage:{tenant}:{earlier // 24}"
            client.hset(there, f"{earlier}|{model.decode()}", each)
            client.pexpire(there, left)


def _shift_drains(client: redis.Redis, key: bytes, milliseconds: int) -> None:
    for name, sums in client.hgetall(key).items():
        if name == b"d" or name[:2] in (b"d:", b"b:", b"w:"):
            drain = Drain.unpack(sums)
            assert drain is not None
            there = replace(drain, at_ms=drain.at_ms - milliseconds)
            client.hset(key, name, there.pack())


@contextmanager
def background_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def opened(kind: str, url: str | None, queue_settings: QueueSettings) -> Iterator[Harness]:
    """A harness of a kind: `memory` or `redis`, each also as `…-async`."""
    with ExitStack() as stack:
        queue: Any
        client: redis.Redis | None = None
        if url is None:
            clock = ManualClock()
            queue = MemoryQueue(queue_settings, clock)
            now: Callable[[], int] = clock

            def advance(milliseconds: int) -> None:
                clock.now += milliseconds

        else:
            client = redis.Redis.from_url(url)
            stack.callback(client.close)
            behind = client

            def advance(milliseconds: int) -> None:
                shift_redis_time(behind, milliseconds)

            def now() -> int:
                seconds, micros = behind.time()
                return int(seconds * 1000 + micros // 1000)

            redis_settings = RedisSettings(url=url)
            if not kind.endswith("-async"):
                sync_client = connect(redis_settings)
                stack.callback(sync_client.close)
                queue = RedisQueue(sync_client, queue_settings)
        if kind.endswith("-async"):
            loop = stack.enter_context(background_loop())
            if url is None:
                queue = AsyncMemoryQueue(queue)
            else:
                async_client = connect_async(RedisSettings(url=url))
                stack.callback(
                    lambda: asyncio.run_coroutine_threadsafe(async_client.aclose(), loop).result(10)
                )
                queue = AsyncRedisQueue(async_client, queue_settings)
            queue = OverLoop(queue, loop)
        yield Harness(queue, advance, now, client)
