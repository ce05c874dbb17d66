"""The readings of the queue as calls: jobs, lists, events, statistics, workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker import keys, scripts, usage
from broker.call import Call, script_call
from broker.drain import Drain
from broker.errors import JobNotFoundError
from broker.idempotency import name_digest
from broker.jobs import BANDS, Band, Event, EventType, Job, JobError, Status
from broker.prospect import COUNTED, position
from broker.prospect_reply import decode_prospect
from broker.stats import (
    BandStats,
    DeadLetter,
    LeaseStats,
    Position,
    QueueStats,
    TenantQueue,
    TenantStats,
    WorkerStatus,
)
from broker.usage import TenantUsage
from broker.wire import decode_event, pairs
from config.settings import Queue as QueueSettings

#: Ids of a tenant's index looked at by one script call.
LIST_BATCH = 500
#: A worker that was silent for this long is dropped from the list of workers.
_FORGET_WORKER_MS = 86_400_000


class ReadingCalls:
    """Calls that change no job; no I/O."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._weight = settings.default_weight
        self._lease_ms = int(settings.lease_ttl_s * 1000)

    def get(self, job_id: str, tenant: str | None) -> Call[Job]:
        def decode(replies: list[Any], _: bool) -> Job:
            raw = pairs(replies[0])
            if not raw or (tenant is not None and raw[b"tenant"] != tenant.encode()):
                raise JobNotFoundError(job_id)
            return Job.from_hash(job_id, raw)

        return Call((("HGETALL", keys.job(job_id)),), decode)

    def was_kept(self, job_id: str, tenant: str) -> Call[bool]:
        command = ("ZSCORE", keys.tenant_jobs(tenant), job_id)
        return Call((command,), lambda replies, _: replies[0] is not None)

    def is_named(self, tenant: str, idempotency_key: str) -> Call[bool]:
        key = keys.idempotency(tenant, name_digest(idempotency_key))
        return Call((("EXISTS", key),), lambda replies, _: bool(replies[0]))

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

    def position(self, job_id: str, tenant: str | None) -> Call[Position | None]:
        def decode(reply: Any, _: bool) -> Position | None:
            if reply[0] < 0:
                raise JobNotFoundError(job_id)
            if reply[0] == 0:
                return None
            code, name, value, raw, *exact = reply
            band = Band(name.decode())
            view = decode_prospect(raw, band, self._settings)
            if code == 1:
                return position(view, 0, due_ms=value)
            return position(view, value, exact=bool(exact[0]))

        return script_call(
            scripts.POSITION, decode, (keys.job(job_id),), job_id, tenant or "", COUNTED
        )

    def stats(self, queue: str, top: int) -> Call[QueueStats]:
        def decode(reply: Any, _: bool) -> QueueStats:
            now, bands, delayed, in_flight, dead, mode, stale, raw, rows = reply
            depths, oldest = bands[::2], bands[1::2]
            drain = Drain.unpack(raw)
            if drain and any(depths):
                drain = drain.seen(now, min(filter(None, oldest)))
            return QueueStats(
                queue=queue,
                bands=tuple(
                    BandStats(band=band, depth=depth, oldest_ms=max(now - since, 0) if depth else 0)
                    for band, depth, since in zip(BANDS, depths, oldest, strict=True)
                ),
                delayed=delayed,
                in_flight=in_flight,
                dead=dead,
                mode=mode.decode() if mode else "running",
                stale_writes=stale,
                jobs_per_s=(drain and drain.jobs_per_s) or 0.0,
                tokens_per_s=(drain and drain.tokens_per_s) or 0.0,
                top_tenants=tuple(
                    tenant_stats(name.decode(), waiting, running, Drain.unpack(sums))
                    for name, waiting, running, sums in zip(*[iter(rows)] * 4, strict=True)
                ),
            )

        return script_call(scripts.STATS, decode, (keys.base(queue),), top)

    def tenant_queue(self, queue: str, tenant: str) -> Call[TenantQueue]:
        def decode(reply: Any, _: bool) -> TenantQueue:
            now, bands, waiting, running, mode, raw = reply
            depths, since = bands[::2], bands[1::2]
            rates = tenant_stats(tenant, waiting, running, Drain.unpack(raw))
            return TenantQueue(
                queue=queue,
                mode=mode.decode() if mode else "running",
                bands=tuple(
                    BandStats(band=band, depth=depth, oldest_ms=max(now - at, 0) if at else 0)
                    for band, depth, at in zip(BANDS, depths, since, strict=True)
                ),
                delayed=waiting - sum(depths),
                in_flight=running,
                jobs_per_s=rates.jobs_per_s,
                tokens_per_s=rates.tokens_per_s,
            )

        return script_call(scripts.TENANT_QUEUE, decode, (keys.base(queue),), tenant)

    def usage(self, tenant: str, hours: int, model: str | None) -> Call[TenantUsage]:
        return script_call(
            scripts.USAGE, lambda reply, _: usage.from_reply(reply[0], reply[1], hours, model),
            (keys.usage(tenant, ""),), hours,
        )  # fmt: skip

    def leases(self, queue: str, owner: str | None, limit: int) -> Call[list[LeaseStats]]:
        def decode(reply: Any, _: bool) -> list[LeaseStats]:
            return [
                LeaseStats(
                    job_id=job_id.decode(),
                    tenant=tenant.decode(),
                    attempt=attempt,
                    owner=holder.decode(),
                    started_ms=started,
                    renewed_ms=expires - self._lease_ms,
                    expires_ms=expires,
                )
                for job_id, tenant, attempt, holder, expires, started in reply
            ]

        return script_call(scripts.LEASES, decode, (keys.base(queue),), owner or "", limit)

    def dead_letters(
        self, queue: str, tenant: str | None, job_id: str | None, after: str | None, limit: int
    ) -> Call[tuple[list[DeadLetter], bool]]:
        def decode(reply: Any, _: bool) -> tuple[list[DeadLetter], bool]:
            letters = [_letter(*entry) for entry in reply]
            return letters[:limit], len(letters) > limit

        return script_call(
            scripts.DEAD_LETTERS, decode, (keys.base(queue),),
            tenant or "", job_id or "", after or "", limit + 1,
        )  # fmt: skip

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
            lambda replies, _: [_worker(raw) for raw in replies[0] if raw],
        )

    def forget_worker(self, owner: str) -> Call[None]:
        commands = (("DEL", keys.worker(owner)), ("ZREM", keys.WORKERS, owner))
        return Call(commands, lambda replies, _: None)

    def queues(self) -> Call[list[str]]:
        return Call(
            (("SMEMBERS", keys.QUEUES),),
            lambda replies, _: sorted(raw.decode() for raw in replies[0]),
        )


def tenant_stats(tenant: str, queued: int, in_flight: int, drain: Drain | None) -> TenantStats:
    return TenantStats(
        tenant=tenant,
        queued=queued,
        in_flight=in_flight,
        jobs_per_s=(drain and drain.jobs_per_s) or 0.0,
        tokens_per_s=(drain and drain.tokens_per_s) or 0.0,
    )


def _worker(raw: bytes) -> WorkerStatus:
    """Of a newer version's word, what this one knows."""
    fields = WorkerStatus.__dataclass_fields__
    return WorkerStatus(**{k: v for k, v in orjson.loads(raw).items() if k in fields})


def _letter(
    letter: bytes,
    job_id: bytes,
    tenant: bytes,
    code: bytes,
    attempt: int,
    died_ms: int,
    record: list[bytes | None],
) -> DeadLetter:
    endpoint, band, error = record or (b"", None, None)
    return DeadLetter(
        letter=letter.decode(),
        job_id=job_id.decode(),
        tenant=tenant.decode(),
        code=code.decode(),
        attempt=attempt,
        died_ms=died_ms,
        alive=bool(record),
        endpoint=(endpoint or b"").decode(),
        band=Band(band.decode()) if band else None,
        error=JobError(**orjson.loads(error)) if error else None,
    )


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
        return script_call(
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
