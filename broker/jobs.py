"""The job: what it is, which states it can be in, and how it is kept in a Redis hash."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

from broker.limits import NO_LIMITS, LimitState, RateLimits

#: Crockford's base 32: no letters that look like digits.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
#: Two letters, 10 bits, at a time: an id is made for every request.
_PAIRS = tuple(high + low for high in _ALPHABET for low in _ALPHABET)
_SHIFTS = tuple(range(120, -1, -10))

#: How long the stub of an erased job is kept: as long as ended jobs are listed.
STUB_S = 8 * 86_400


class Band(StrEnum):
    """Priority class; a higher one goes first, a lower one keeps a guaranteed share."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


#: Highest first.
BANDS: tuple[Band, ...] = (Band.INTERACTIVE, Band.STANDARD, Band.BATCH)

#: Least part of the tokens each band gets when all are backlogged.
BAND_SHARES: dict[Band, float] = {Band.INTERACTIVE: 0.75, Band.STANDARD: 0.20, Band.BATCH: 0.05}


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    #: Transient: a running job that was asked to stop.
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


#: A job in one of these never changes again.
TERMINAL: frozenset[Status] = frozenset(
    {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.EXPIRED}
)


def new_job_id() -> str:
    """`job_` and 26 characters: 48 bits of Unix milliseconds, then 80 random bits (as a ULID)."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return "job_" + "".join([_PAIRS[(number >> shift) & 1023] for shift in _SHIFTS])


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a job really took."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class JobError:
    """Why a job failed; shown to its owner."""

    #: One of the stable codes of the API's error table.
    code: str
    #: For people; never holds prompt or output text.
    message: str
    #: The request parameter at fault, when there is one.
    param: str | None = None


@dataclass(kw_only=True, slots=True)
class NewJob:
    """A job on its way into the queue.

    Never changed once made; not frozen, because that would take a third of the time of making it.
    """

    id: str = field(default_factory=new_job_id)
    #: Owner, from the credential.
    tenant: str
    #: Id of the API key that submitted it.
    key_id: str = ""
    #: Name in the model catalogue; also the name of its queue.
    model: str
    #: OpenAI path the body belongs to, e.g. `/v1/chat/completions`.
    endpoint: str
    band: Band = Band.INTERACTIVE
    #: Estimated tokens (prompt + most that may be generated); settled with real counts at the end.
    cost: int = 1
    #: The request body as JSON; opaque to the broker.
    body: bytes
    #: The caller's own `metadata` as JSON.
    metadata: bytes = b"{}"
    #: Token deltas are wanted.
    stream: bool = False
    max_attempts: int = 3
    #: How long the record stays readable once the job is terminal.
    result_ttl_s: int = 86_400
    #: Earliest start, counted from the enqueue; 0 is at once.
    delay_ms: int = 0
    #: A job that waits at this moment (Unix milliseconds) expires; 0 is never.
    deadline_ms: int = 0
    #: Longest one attempt may run; 0 is without a bound. Kept by the worker.
    execution_timeout_ms: int = 0
    #: Joins log lines across processes.
    request_id: str = ""
    #: The tenant's own name for this request: for 24 hours the same name finds the same job.
    idempotency_key: str = ""
    #: What a request must have in common with the first one of its key; empty: its endpoint, model,
    #: band and body.
    fingerprint: str = ""
    #: Bounds of the tenant, and of the key (`key_id`) it was submitted with.
    limits: RateLimits = NO_LIMITS
    key_limits: RateLimits = NO_LIMITS
    #: JSON of a `broker.webhooks.endpoints.JobWebhook` that its end is told to; empty: none.
    webhook: bytes = b""
    #: Its answer is neither kept for other jobs nor taken from them (`broker.answers`).
    no_store: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """Answer to an enqueue."""

    #: Id of the job; with `replayed` that of the first request.
    job_id: str
    #: Jobs of the tenant that wait before it in its band.
    position: int
    #: The idempotency key had been used for the same request before; nothing was written.
    replayed: bool = False
    #: The rate limits the job is under, as they stand now.
    limits: tuple[LimitState, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as its record in Redis tells it. Times are Unix milliseconds, 0 when not yet."""

    id: str
    tenant: str
    key_id: str
    model: str
    endpoint: str
    band: Band
    status: Status
    cost: int
    body: bytes
    metadata: bytes
    stream: bool
    attempt: int
    max_attempts: int
    created_ms: int
    #: Start of the latest attempt.
    started_ms: int
    finished_ms: int
    result_ttl_s: int
    request_id: str
    #: Sequence number of the latest event.
    seq: int
    #: JSON of the response body, when completed.
    output: bytes | None
    error: JobError | None
    usage: Usage
    #: Moment until which it has to be started (Unix milliseconds); 0 is never.
    deadline_ms: int = 0
    #: Longest one attempt may run; 0 is without a bound.
    execution_timeout_ms: int = 0
    #: Attempts that don't count towards `max_attempts`: handed back, or before a retry.
    refunds: int = 0
    #: When its owner had its content erased: from the end on there is neither prompt nor output.
    erased_ms: int = 0
    #: As in `NewJob`.
    webhook: bytes = b""
    no_store: bool = False

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def from_hash(cls, job_id: str, raw: dict[bytes, bytes]) -> Job:
        """Decode the record `HGETALL fb:job:<id>`; the inverse of what the Lua scripts write."""

        def text(name: bytes) -> str:
            return raw.get(name, b"").decode()

        def number(name: bytes) -> int:
            return int(raw.get(name) or 0)

        error = raw.get(b"error")
        usage: dict[str, Any] = orjson.loads(raw[b"usage"]) if raw.get(b"usage") else {}
        return cls(
            id=job_id,
            tenant=text(b"tenant"),
            key_id=text(b"key_id"),
            model=text(b"model"),
            endpoint=text(b"endpoint"),
            band=Band(text(b"band")),
            status=Status(text(b"status")),
            cost=number(b"cost"),
            body=raw.get(b"body", b""),
            metadata=raw.get(b"metadata", b"{}"),
            stream=raw.get(b"stream") == b"1",
            attempt=number(b"attempt"),
            max_attempts=number(b"max_attempts"),
            created_ms=number(b"created_ms"),
            started_ms=number(b"started_ms"),
            finished_ms=number(b"finished_ms"),
            result_ttl_s=number(b"result_ttl_s"),
            request_id=text(b"request_id"),
            seq=number(b"seq"),
            output=raw.get(b"output"),
            error=JobError(**orjson.loads(error)) if error else None,
            usage=Usage(**usage),
            deadline_ms=number(b"deadline_ms"),
            execution_timeout_ms=number(b"execution_timeout_ms"),
            refunds=number(b"refunds"),
            erased_ms=number(b"erased_ms"),
            webhook=raw.get(b"webhook", b""),
            no_store=b"no_store" in raw,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A job leased to a worker; the attempt is its fencing token."""

    queue: str
    job: Job

    @property
    def attempt(self) -> int:
        return self.job.attempt


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended for good."""

    #: `COMPLETED`, `FAILED` or `CANCELLED`.
    status: Status
    #: JSON of the response body, when completed (also partial output of a cancelled job).
    output: bytes | None = None
    error: JobError | None = None
    usage: Usage = field(default_factory=Usage)
    #: Tokens the tenant is charged for where nothing was computed; None: those of `usage`.
    charged: int | None = None
    #: Where its output is kept for jobs like it (`broker.answers`); erased with the job.
    answer: str = ""

    @property
    def taken(self) -> int:
        """Tokens that count towards shares and limits."""
        return self.usage.total_tokens if self.charged is None else self.charged


class EventType(StrEnum):
    QUEUED = "job.queued"
    IN_PROGRESS = "job.in_progress"
    DELTA = "job.delta"
    #: The attempt was given up (worker lost, handed back); text of it no longer counts.
    REQUEUED = "job.requeued"
    CANCELLING = "job.cancelling"
    COMPLETED = "job.completed"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    EXPIRED = "job.expired"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL_EVENTS


_TERMINAL_EVENTS = frozenset(
    {EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED, EventType.EXPIRED}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of a job's event log, and one message on its channel."""

    #: Counts from 1 without gaps within a job.
    seq: int
    type: EventType
    attempt: int
    #: Token text of a `job.delta`, else empty.
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """Text a running attempt wants to publish."""

    job_id: str
    attempt: int
    text: str
    #: Bytes (UTF-8) of the attempt's text before this piece. With it a piece that is sent again,
    #: alone or as the beginning of a longer one, is not published twice; None: not checked.
    start: int | None = None
