"""A batch of slots that is fed by a queue, on a clock of decode steps instead of time.

Claims and completions are real; only the engine between them is counted instead of waited for, so
that shares are the queue's doing and not the machine's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis

from broker.call import Call
from broker.calls import Calls
from broker.jobs import Accepted, Band, Claim, NewJob, Outcome, Status, Usage
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from broker.wire import pack
from config.settings import Queue
from loadtests.harness import BenchError
from loadtests.stack import MODEL

_PIPELINE = 500
_UNBOUNDED = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A job as the benchmark knows it: what it will take, and what the queue is told."""

    tenant: str
    band: Band = Band.STANDARD
    prompt: int
    answer: int
    #: Prompt and most that may be generated: known before the job runs.
    cost: int


class Source(Protocol):
    def put(self, work: Sequence[Work]) -> None: ...

    def take(self, most: int) -> list[tuple[object, Work]]: ...

    def done(self, ticket: object, work: Work) -> None: ...


class Fifo:
    """First come, first served: what a plain list gives."""

    def __init__(self) -> None:
        self._waiting: deque[Work] = deque()

    def put(self, work: Sequence[Work]) -> None:
        self._waiting.extend(work)

    def take(self, most: int) -> list[tuple[object, Work]]:
        return [(None, self._waiting.popleft()) for _ in range(min(most, len(self._waiting)))]

    def done(self, ticket: object, work: Work) -> None:
        pass


class Fair:
    """Forebay's queue on a Redis of its own, which is emptied first."""

    def __init__(self, url: str, weights: dict[str, float]) -> None:
        self._redis = redis.Redis.from_url(url)
        self._redis.flushall()
        settings = Queue(default_max_queued=_UNBOUNDED, max_queued_total=_UNBOUNDED)
        self._queue = RedisQueue(self._redis, settings)
        self._queue.load_scripts()
        self._filler = Filler(self._redis, settings)
        self._work: dict[str, Work] = {}
        for tenant, weight in weights.items():
            policy = TenantPolicy(weight=weight, max_in_flight=10_000, max_queued=_UNBOUNDED)
            self._queue.set_policy(tenant, policy)

    def put(self, work: Sequence[Work]) -> None:
        jobs = [
            NewJob(
                tenant=each.tenant,
                model=MODEL,
                endpoint="/v1/chat/completions",
                band=each.band,
                cost=each.cost,
                body=b"{}",
            )
            for each in work
        ]
        self._filler.put(jobs)
        self._work.update({job.id: each for job, each in zip(jobs, work, strict=True)})

    def take(self, most: int) -> list[tuple[object, Work]]:
        claims = self._queue.claim(MODEL, "bench", limit=most)
        return [(claim, self._work.pop(claim.job.id)) for claim in claims]

    def done(self, ticket: object, work: Work) -> None:
        assert isinstance(ticket, Claim)
        usage = Usage(input_tokens=work.prompt, output_tokens=work.answer)
        outcome = Outcome(status=Status.COMPLETED, output=b"{}", usage=usage)
        if not self._queue.complete(ticket, outcome):
            raise BenchError("a completion was refused as stale: the machine stood still")


class Filler:
    """Puts jobs into a queue in pipelines of several hundred."""

    def __init__(self, client: redis.Redis, settings: Queue) -> None:
        self._calls = Calls(settings)
        # Untyped in redis-py.
        self._connection: Any = client.connection_pool.get_connection()

    def put(self, jobs: Iterable[NewJob]) -> None:
        pending: list[Call[Accepted]] = []
        for job in jobs:
            pending.append(self._calls.enqueue(job))
            if len(pending) == _PIPELINE:
                self._send(pending)
                pending = []
        if pending:
            self._send(pending)

    def _send(self, calls: Sequence[Call[Accepted]]) -> None:
        commands = [call.commands[0] for call in calls]
        self._connection.send_packed_command([pack(commands)])
        replies = [self._connection.read_response() for _ in calls]
        for call, reply in zip(calls, replies, strict=True):
            call.decode([reply], False)


@dataclass(slots=True)
class Served:
    """What a run has given, tenant by tenant and band by band, in tokens."""

    tenants: Counter[str] = field(default_factory=Counter)
    bands: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    #: Most tokens (prompts and answers so far) that the batch held.
    batch_tokens: int = 0

    def count(self, work: Work, tokens: int) -> None:
        self.tenants[work.tenant] += tokens
        self.bands[work.band] += tokens


@dataclass(slots=True)
class _Running:
    ticket: object
    work: Work
    made: int = 0


def serve(
    source: Source,
    work: Sequence[Work],
    *,
    slots: int,
    each_step: Callable[[Served], None] = lambda _: None,
) -> Served:
    """Run the work until a tenant has nothing waiting in a band: until then all are backlogged."""
    source.put(work)
    waiting = Counter((each.band, each.tenant) for each in work)
    served = Served()
    running: list[_Running] = []
    while min(waiting.values()) > 0:
        if len(running) < slots:
            for ticket, each in source.take(slots - len(running)):
                waiting[each.band, each.tenant] -= 1
                served.count(each, each.prompt)
                running.append(_Running(ticket, each))
        if not running:
            raise BenchError("the queue gave nothing though jobs wait")
        for job in running:
            job.made += 1
            served.count(job.work, 1)
        held = sum(job.work.prompt + job.made for job in running)
        served.batch_tokens = max(served.batch_tokens, held)
        served.steps += 1
        each_step(served)
        for job in running:
            if job.made == job.work.answer:
                source.done(job.ticket, job.work)
        running = [job for job in running if job.made < job.work.answer]
    return served
