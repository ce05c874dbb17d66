"""Every operation of the queue as data: what to send, and what the answer means.

`RedisQueue` and `AsyncRedisQueue` differ only in how they send a `Call`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import orjson

from broker import keys, scripts
from broker.errors import DuplicateJobError, JobNotFoundError, QueueFullError
from broker.jobs import (
    BANDS,
    Band,
    Claim,
    Delta,
    Event,
    EventType,
    Job,
    JobError,
    NewJob,
    Outcome,
    Status,
)
from broker.policies import TenantPolicy
from broker.queue import CancelResult, LeaseState
from broker.scripts import Script
from broker.stats import BandStats, QueueStats, TenantStats, WorkerStatus
from broker.wire import Arg, decode_event, pairs
from config.settings import Queue as QueueSettings

T = TypeVar("T")

#: Leases given back, and ids of a tenant's index looked at, by one script call.
RELEASE_BATCH = 500
LIST_BATCH = 500
#: Ids looked at by one sweep, about.
SWEEP_BATCH = 200
#: A worker that was silent for this long is dropped from the list of workers.
_FORGET_WORKER_MS = 86_400_000

_LEASE_STATES: tuple[LeaseState, ...] = ("ok", "lost", "cancel")
_CANCEL_RESULTS: tuple[CancelResult, ...] = ("cancelled", "cancelling", "terminal")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Commands sent in one go, and how their replies are read."""

    commands: tuple[tuple[Arg, ...], ...]
    #: Takes the replies and whether the commands were sent twice.
    decode: Callable[[list[Any], bool], T]
    #: The script that is the one command, if it is one.
    script: Script | None = None
    #: May be sent again when the connection broke before the answer came.
    repeatable: bool = True

    @property
    def by_source(self) -> tuple[tuple[Arg, ...], ...]:
        """The same with the script's source instead of its hash; also makes it known."""
        assert self.script is not None
        return (("EVAL", self.script.source, *self.commands[0][2:]),)


def _script(
    script: Script,
    decode: Callable[[Any, bool], T],
    keys_: Sequence[Arg],
    *args: Arg,
    repeatable: bool = True,
) -> Call[T]:
    return Call(
        (("EVALSHA", script.sha, len(keys_), *keys_, *args),),
        lambda replies, repeated: decode(replies[0], repeated),
        script,
        repeatable,
    )


class Calls:
    """The calls under given settings; no I/O."""

    def __init__(self, settings: QueueSettings) -> None:
        self._lease_ms = int(settings.lease_ttl_s * 1000)
        self._max_total = settings.max_queued_total
        self._weight = settings.default_weight
        self._cap = settings.default_max_in_flight
        self._max_queued = settings.default_max_queued

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> Call[int]:
        def decode(reply: Any, repeated: bool) -> int:
            code, value = reply
            if code == 0 or (code == 1 and repeated):
                return int(value)
            if code == 1:
                raise DuplicateJobError(job.id)
            raise QueueFullError("tenant" if code == 2 else "model", int(value))

        fields: list[Arg] = [
            "model", job.model, "endpoint", job.endpoint, "body", job.body,
            "max_attempts", job.max_attempts, "result_ttl_s", job.result_ttl_s,
        ]  # fmt: skip
        if job.key_id:
            fields += ("key_id", job.key_id)
        if job.metadata != b"{}":
            fields += ("metadata", job.metadata)
        if job.stream:
            fields += ("stream", 1)
        if job.request_id:
            fields += ("request_id", job.request_id)
        return _script(
            scripts.ENQUEUE, decode, (keys.base(job.model),),
            job.id, job.tenant, job.band, job.cost, job.delay_ms,
            self._max_queued, self._max_total, *fields,
        )  # fmt: skip

    def get(self, job_id: str, tenant: str | None) -> Call[Job]:
        def decode(replies: list[Any], _: bool) -> Job:
            raw = pairs(replies[0])
            if not raw or (tenant is not None and raw[b"tenant"] != tenant.encode()):
                raise JobNotFoundError(job_id)
            return Job.from_hash(job_id, raw)

        return Call((("HGETALL", keys.job(job_id)),), decode)

    def cancel(self, job_id: str, tenant: str | None) -> Call[CancelResult]:
        def decode(reply: int, _: bool) -> CancelResult:
            if reply < 0:
                raise JobNotFoundError(job_id)
            return _CANCEL_RESULTS[reply]

        return _script(scripts.CANCEL, decode, (keys.job(job_id),), job_id, tenant or "")

    def events(self, job_id: str, after: int) -> Call[tuple[list[Event], bool]]:
        def decode(replies: list[Any], _: bool) -> tuple[list[Event], bool]:
            if not replies[0]:
                raise JobNotFoundError(job_id)
            log = [decode_event(line) for line in replies[1]]
            if not log or log[0].seq == 2:
                log.insert(0, Event(seq=1, type=EventType.QUEUED, attempt=0))
            return [event for event in log if event.seq > after], log[0].seq <= after + 1

        commands = (("EXISTS", keys.job(job_id)), ("LRANGE", keys.events(job_id), 0, -1))
        return Call(commands, decode)

    def text(self, job_id: str) -> Call[str]:
        return Call((("GET", keys.text(job_id)),), lambda replies, _: (replies[0] or b"").decode())

    # -- working side -----------------------------------------------------------------------------
    def claim(self, queue: str, owner: str, limit: int) -> Call[list[Claim]]:
        return _script(
            scripts.CLAIM, lambda reply, _: self.decode_claims(queue, reply), (keys.base(queue),),
            owner, self._lease_ms, limit, self._weight, self._cap,
        )  # fmt: skip

    @staticmethod
    def decode_claims(queue: str, reply: list[Any]) -> list[Claim]:
        return [
            Claim(queue=queue, job=Job.from_hash(reply[k].decode(), pairs(reply[k + 1])))
            for k in range(0, len(reply), 2)
        ]

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> Call[dict[str, LeaseState]]:
        def decode(reply: Any, _: bool) -> dict[str, LeaseState]:
            return {
                lease[0]: _LEASE_STATES[state] for lease, state in zip(leases, reply, strict=True)
            }

        flat = (part for lease in leases for part in lease)
        return _script(scripts.RENEW, decode, (keys.base(queue),), owner, self._lease_ms, *flat)

    def emit(self, queue: str, deltas: Sequence[Delta]) -> Call[list[str]]:
        flat: list[Arg] = []
        for delta in deltas:
            start = -1 if delta.start is None else delta.start
            flat += (delta.job_id, delta.attempt, start, delta.text.encode(errors="replace"))
        return _script(
            scripts.EMIT, lambda reply, _: [raw.decode() for raw in reply], (keys.base(queue),),
            *flat, repeatable=all(delta.start is not None for delta in deltas),
        )  # fmt: skip

    def complete(self, claim: Claim, outcome: Outcome, *, dead_code: str = "") -> Call[bool]:
        fields: list[Arg] = ["usage", orjson.dumps(outcome.usage)]
        if outcome.output is not None:
            fields += ("output", outcome.output)
        if outcome.error is not None:
            fields += ("error", orjson.dumps(outcome.error))
        return _script(
            scripts.COMPLETE, _truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, outcome.status, outcome.usage.total_tokens,
            self._weight, self._cap, dead_code, *fields,
        )  # fmt: skip

    def bury(self, claim: Claim, error_code: str, message: str) -> Call[bool]:
        error = JobError(code=error_code, message=message)
        outcome = Outcome(status=Status.FAILED, error=error)
        return self.complete(claim, outcome, dead_code=error_code)

    def requeue(self, claim: Claim, delay_ms: int, refund: bool) -> Call[bool]:
        return _script(
            scripts.REQUEUE, _truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, delay_ms, int(refund), self._weight, self._cap,
        )  # fmt: skip

    def release_owner(self, queue: str, owner: str) -> Call[int]:
        """At most `RELEASE_BATCH` leases; to be called until fewer come back."""
        return _script(
            scripts.RELEASE_OWNER, _number, (keys.base(queue),), owner, RELEASE_BATCH, self._cap
        )

    def sweep(self, queue: str) -> Call[int]:
        return _script(scripts.SWEEP, _number, (keys.base(queue),), self._cap, SWEEP_BATCH)

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(
        self, tenant: str, policy: TenantPolicy | None, queues: Sequence[str]
    ) -> Call[None]:
        values = (policy.weight, policy.max_in_flight, policy.max_queued) if policy else ()
        return _script(
            scripts.SET_POLICY, _nothing, [keys.base(queue) for queue in queues],
            tenant, self._cap, *values,
        )  # fmt: skip

    def stats(self, queue: str, top: int) -> Call[QueueStats]:
        def decode(reply: Any, _: bool) -> QueueStats:
            now, bands, delayed, in_flight, dead, tenants = reply
            return QueueStats(
                queue=queue,
                bands=tuple(
                    BandStats(
                        band=band,
                        depth=bands[2 * n],
                        oldest_ms=max(now - bands[2 * n + 1], 0) if bands[2 * n] else 0,
                    )
                    for n, band in enumerate(BANDS)
                ),
                delayed=delayed,
                in_flight=in_flight,
                dead=dead,
                top_tenants=tuple(
                    TenantStats(
                        tenant=tenants[k].decode(), queued=tenants[k + 1], in_flight=tenants[k + 2]
                    )
                    for k in range(0, len(tenants), 3)
                ),
            )

        return _script(scripts.STATS, decode, (keys.base(queue),), top)

    def heartbeat(self, status: WorkerStatus, ttl_s: float) -> Call[None]:
        commands = (
            ("SET", keys.worker(status.owner), orjson.dumps(status), "PX", int(ttl_s * 1000)),
            ("ZADD", keys.WORKERS, status.seen_ms, status.owner),
            ("ZREMRANGEBYSCORE", keys.WORKERS, "-inf", status.seen_ms - _FORGET_WORKER_MS),
        )
        return Call(commands, lambda replies, _: None)

    def worker_names(self) -> Call[list[str]]:
        return Call(
            (("ZRANGE", keys.WORKERS, 0, -1),),
            lambda replies, _: [raw.decode() for raw in replies[0]],
        )

    def workers(self, owners: Sequence[str]) -> Call[list[WorkerStatus]]:
        """Of those that still live; `owners` must not be empty."""
        return Call(
            (("MGET", *map(keys.worker, owners)),),
            lambda replies, _: [WorkerStatus(**orjson.loads(raw)) for raw in replies[0] if raw],
        )

    def forget_worker(self, owner: str) -> Call[None]:
        commands = (("DEL", keys.worker(owner)), ("ZREM", keys.WORKERS, owner))
        return Call(commands, lambda replies, _: None)

    def queues(self) -> Call[list[str]]:
        return Call(
            (("SMEMBERS", keys.QUEUES),),
            lambda replies, _: sorted(raw.decode() for raw in replies[0]),
        )

    def ping(self) -> Call[None]:
        return Call((("PING",),), lambda replies, _: None)

    def load_scripts(self) -> Call[None]:
        commands = tuple(("SCRIPT", "LOAD", script.source) for script in scripts.ALL)
        return Call(commands, lambda replies, _: None)


@dataclass(kw_only=True)
class Listing:
    """Reads a page of a tenant's jobs: `call` and `feed` in turn until `done`."""

    tenant: str
    status: Status | None
    model: str | None
    band: Band | None
    created_after_ms: int
    after: str | None
    limit: int
    newest_first: bool
    done: bool = False
    _jobs: list[Job] = field(default_factory=list)

    def call(self) -> Call[list[Any]]:
        return _script(
            scripts.LIST_JOBS, lambda reply, _: list(reply), (keys.tenant_jobs(self.tenant),),
            self.status or "", self.model or "", self.band or "", self.created_after_ms,
            self.after or "", self.limit + 1 - len(self._jobs), LIST_BATCH, int(self.newest_first),
        )  # fmt: skip

    def feed(self, reply: list[Any]) -> None:
        if not reply:
            raise JobNotFoundError(self.after)
        self.after = reply[0].decode()
        self._jobs += (
            Job.from_hash(reply[k].decode(), pairs(reply[k + 1])) for k in range(1, len(reply), 2)
        )
        self.done = not self.after or len(self._jobs) > self.limit

    @property
    def page(self) -> tuple[list[Job], bool]:
        return self._jobs[: self.limit], len(self._jobs) > self.limit


def _truth(reply: Any, _: bool) -> bool:
    return bool(reply)


def _number(reply: Any, _: bool) -> int:
    return int(reply)


def _nothing(_reply: Any, _: bool) -> None:
    return None
