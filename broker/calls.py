"""Every operation of the queue as data: what to send, and what the answer means.

`RedisQueue` and `AsyncRedisQueue` differ only in how they send a `Call`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import orjson

from broker import keys, scripts
from broker.call import Call, nothing, number, replicated, script_call, truth
from broker.errors import (
    BrokerError,
    DuplicateJobError,
    IdempotencyConflictError,
    JobNotFoundError,
    NotRetryableError,
    OverloadedError,
    QueueDrainingError,
    QueueFullError,
    RateLimitedError,
)
from broker.forecast import Outlook, queue_wait_ms, tenant_wait_ms
from broker.idempotency import LIFETIME_MS, digests
from broker.jobs import Accepted, Band, Claim, Delta, Job, JobError, NewJob, Outcome, Status
from broker.limits import METERS, NO_LIMITS, LimitState, Scope
from broker.limits import state as limit_state
from broker.policies import TenantPolicy, shedding_marks
from broker.queue import CancelResult, LeaseState
from broker.reading_calls import ReadingCalls
from broker.stats import Claimable, QueueMode
from broker.webhooks.outbox import OutboxEvent
from broker.wire import Arg, pairs
from config.settings import Queue as QueueSettings

#: Leases given back by one script call.
RELEASE_BATCH = 500
#: Jobs cancelled, and put in again, by one script call.
CANCEL_BATCH = 500
REPLAY_BATCH = 100
#: Ids looked at by one sweep, about.
SWEEP_BATCH = 200
#: A wake-up that its worker doesn't hear is of no use for longer.
WAKE_MS = 10_000
#: Largest output that goes out with the message of a job's end (bytes).
MOST_TOLD_BYTES = 16_384

_LEASE_STATES: tuple[LeaseState, ...] = ("ok", "lost", "cancel")
_CANCEL_RESULTS: tuple[CancelResult, ...] = ("cancelled", "cancelling", "terminal")


class Calls(ReadingCalls):
    """The calls under given settings; no I/O."""

    def __init__(self, settings: QueueSettings) -> None:
        super().__init__(settings)
        self._marks = shedding_marks(settings)
        self._cap = settings.default_max_in_flight
        self._max_queued = settings.default_max_queued
        self._replicas = settings.await_replicas

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> Call[Accepted]:
        def decode(reply: Any, repeated: bool) -> Accepted:
            code = reply[0]
            if code == 0 or (code == 1 and repeated):
                return _accepted(job.id, reply)
            if code == 1:
                raise DuplicateJobError(job.id)
            if code == 4:
                first = reply[4].decode()
                return _accepted(first, reply, replayed=first != job.id)
            if code == 5:
                raise IdempotencyConflictError(reply[1].decode())
            raise self._refusal(reply)

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
        if job.execution_timeout_ms:
            fields += ("execution_timeout_ms", job.execution_timeout_ms)
        if job.webhook:
            fields += ("webhook", job.webhook)
        if job.no_store:
            fields += ("no_store", 1)
        if job.batch_line:
            fields += ("line", 1)
        name, request = digests(job)
        call = script_call(
            scripts.ENQUEUE, decode, (keys.base(job.model),),
            job.id, job.tenant, job.band, job.cost, job.delay_ms,
            self._max_queued, self._marks[job.band], job.deadline_ms,
            name and keys.idempotency(job.tenant, name), request, LIFETIME_MS,
            _limits(job), job.key_id,
            "line" if job.batch_line else job.key_limits.max_jobs if job.key_id else 0, *fields,
        )  # fmt: skip
        return replicated(call, self._replicas) if self._replicas else call

    def announce(self, event: OutboxEvent) -> Call[bool]:
        where = (keys.webhook_endpoints(event.tenant),)
        call = script_call(scripts.ANNOUNCE, truth, where, event.to_json())
        return replicated(call, self._replicas) if self._replicas else call

    def cancel(self, job_ids: Sequence[str], tenant: str | None) -> Call[dict[str, CancelResult]]:
        """At most `CANCEL_BATCH` jobs."""

        def decode(reply: list[int], _: bool) -> dict[str, CancelResult]:
            return {
                job_id: _CANCEL_RESULTS[code]
                for job_id, code in zip(job_ids, reply, strict=True)
                if code >= 0
            }

        return script_call(scripts.CANCEL, decode, (), tenant or "", *job_ids)

    def erase(self, job_id: str, tenant: str | None) -> Call[bool]:
        def decode(reply: int, _: bool) -> bool:
            if reply < 0:
                raise JobNotFoundError(job_id)
            return reply == 0

        return script_call(scripts.ERASE, decode, (), job_id, tenant or "")

    def retry(self, job_id: str, tenant: str | None, deadline_ms: int) -> Call[Accepted]:
        def decode(reply: Any, _: bool) -> Accepted:
            code = reply[0]
            if code == -1:
                raise JobNotFoundError(job_id)
            if code == 1:
                raise NotRetryableError(job_id, reply[1].decode())
            if code:
                raise self._refusal(reply)
            return _accepted(job_id, reply)

        return script_call(
            scripts.RETRY, decode, (keys.job(job_id),),
            job_id, tenant or "", deadline_ms, os.urandom(8).hex(), self._max_queued,
            *self._marks.values(),
        )  # fmt: skip

    def _refusal(self, reply: Any) -> BrokerError:
        """The error for what `refusal` in the prelude returns."""
        if reply[0] == 7:
            return self._limited(*reply[1:])
        if reply[0] == 6:
            return QueueDrainingError("the queue takes no new jobs")
        code, limit, raw, waiting, name = reply
        band = Band(name.decode())
        outlook = Outlook.from_reply(raw, band, self._weight)
        if code == 2:
            return QueueFullError("tenant", limit, tenant_wait_ms(outlook, band, limit))
        return OverloadedError(band, limit, queue_wait_ms(outlook, waiting, limit))

    def _limited(
        self, which: int, wait: int, bound: int, now: int, meters: list[Any], raw: Any, name: bytes
    ) -> RateLimitedError:
        states = _states(meters, now)
        if which <= len(METERS):
            return RateLimitedError(*METERS[which - 1], bound, wait, states)
        band = Band(name.decode())
        outlook = Outlook.from_reply(raw, band, self._weight)
        wait = tenant_wait_ms(outlook, band, bound)
        scope: Scope = "key" if which == len(METERS) + 2 else "tenant"
        return RateLimitedError(scope, "jobs", bound, wait, states)

    def set_mode(self, queue: str, mode: QueueMode) -> Call[None]:
        return script_call(scripts.SET_MODE, nothing, (keys.base(queue),), mode)

    # -- dead letters -----------------------------------------------------------------------------
    def replay_dead(
        self, queue: str, tenant: str | None, job_id: str | None, limit: int
    ) -> Call[list[str]]:
        """At most `REPLAY_BATCH` jobs."""
        return script_call(
            scripts.REPLAY_DEAD, lambda reply, _: [raw.decode() for raw in reply],
            (keys.base(queue),),
            tenant or "", job_id or "", limit, self._max_queued, *self._marks.values(),
            repeatable=False,
        )  # fmt: skip

    def purge_dead(self, queue: str, tenant: str | None, job_id: str | None) -> Call[int]:
        return script_call(
            scripts.PURGE_DEAD, number, (keys.base(queue),), tenant or "", job_id or ""
        )

    # -- working side -----------------------------------------------------------------------------
    def claim(
        self, queue: str, owner: str, limit: int, batch_room: int | None = None
    ) -> Call[list[Claim]]:
        return script_call(
            scripts.CLAIM, lambda reply, _: self.decode_claims(queue, reply), (keys.base(queue),),
            owner, self._lease_ms, limit, self._weight, self._cap,
            limit if batch_room is None else batch_room,
        )  # fmt: skip

    def wake(self, queue: str, owner: str) -> Call[None]:
        key = keys.wake(queue, owner)
        return Call((("RPUSH", key, 1), ("PEXPIRE", key, WAKE_MS)), lambda replies, _: None)

    @staticmethod
    def decode_claims(queue: str, reply: list[Any]) -> list[Claim]:
        return [
            Claim(queue=queue, job=Job.from_hash(reply[k].decode(), pairs(reply[k + 1])))
            for k in range(0, len(reply) - 1, 2)
        ]

    @staticmethod
    def more_waits(reply: list[Any]) -> bool:
        return len(reply) % 2 == 1

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> Call[dict[str, LeaseState]]:
        def decode(reply: Any, _: bool) -> dict[str, LeaseState]:
            return {
                lease[0]: _LEASE_STATES[state] for lease, state in zip(leases, reply, strict=True)
            }

        flat = (part for lease in leases for part in lease)
        return script_call(scripts.RENEW, decode, (keys.base(queue),), owner, self._lease_ms, *flat)

    def emit(self, queue: str, deltas: Sequence[Delta]) -> Call[list[str]]:
        flat: list[Arg] = []
        for delta in deltas:
            start = -1 if delta.start is None else delta.start
            flat += (delta.job_id, delta.attempt, start, delta.text.encode(errors="replace"))
        return script_call(
            scripts.EMIT, lambda reply, _: [raw.decode() for raw in reply], (keys.base(queue),),
            *flat, repeatable=all(delta.start is not None for delta in deltas),
        )  # fmt: skip

    def complete(self, claim: Claim, outcome: Outcome, *, dead_code: str = "") -> Call[bool]:
        used = outcome.usage
        fields: list[Arg] = ["usage", orjson.dumps(used)]
        if outcome.output is not None:
            fields += ("output", outcome.output)
        if outcome.error is not None:
            fields += ("error", orjson.dumps(outcome.error))
        if outcome.answer:
            fields += ("answer", outcome.answer)
        return script_call(
            scripts.COMPLETE, truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, outcome.status, outcome.taken,
            self._weight, self._cap, dead_code, _told(claim.job, outcome),
            used.input_tokens, used.cached_tokens, used.output_tokens, *fields,
        )  # fmt: skip

    def bury(self, claim: Claim, error_code: str, message: str) -> Call[bool]:
        error = JobError(code=error_code, message=message)
        outcome = Outcome(status=Status.FAILED, error=error)
        return self.complete(claim, outcome, dead_code=error_code)

    def requeue(self, claim: Claim, delay_ms: int, refund: bool) -> Call[bool]:
        return script_call(
            scripts.REQUEUE, truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, delay_ms, int(refund), self._weight, self._cap,
        )  # fmt: skip

    def release_owner(self, queue: str, owner: str) -> Call[int]:
        """At most `RELEASE_BATCH` leases; to be called until fewer come back."""
        return script_call(
            scripts.RELEASE_OWNER, number, (keys.base(queue),), owner, RELEASE_BATCH, self._cap
        )

    def sweep(self, queue: str) -> Call[int]:
        return script_call(scripts.SWEEP, number, (keys.base(queue),), self._cap, SWEEP_BATCH)

    def count_claimable(self, queue: str, most: int, batch_room: int | None) -> Call[Claimable]:
        return script_call(
            scripts.COUNT_CLAIMABLE, lambda reply, _: Claimable(*reply), (keys.base(queue),),
            self._cap, most, "" if batch_room is None else batch_room,
        )  # fmt: skip

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(
        self, tenant: str, policy: TenantPolicy | None, queues: Sequence[str]
    ) -> Call[None]:
        values = (policy.weight, policy.max_in_flight, policy.max_queued) if policy else ()
        return script_call(
            scripts.SET_POLICY, nothing, [keys.base(queue) for queue in queues],
            tenant, self._cap, *values,
        )  # fmt: skip

    def ping(self) -> Call[None]:
        return Call((("PING",),), lambda replies, _: None)

    def load_scripts(self) -> Call[None]:
        commands = tuple(("SCRIPT", "LOAD", script.source) for script in scripts.ALL)
        return Call(commands, lambda replies, _: None)


def _limits(job: NewJob) -> str:
    """The rate limits of a job as the scripts take them; empty without any."""
    if job.batch_line:
        return ""
    mine, keys_ = job.limits, job.key_limits if job.key_id else NO_LIMITS
    if mine is NO_LIMITS and keys_ is NO_LIMITS:
        return ""
    numbers = (
        mine.requests_per_minute,
        mine.tokens_per_minute,
        mine.max_jobs,
        keys_.requests_per_minute,
        keys_.tokens_per_minute,
    )
    return "|".join(map(str, numbers)) if any(numbers) or keys_.max_jobs else ""


def _accepted(job_id: str, reply: Any, *, replayed: bool = False) -> Accepted:
    """From `{…, position, now, meters, …}`."""
    _, position, now, meters = reply[:4]
    limits = _states(meters, now) if meters else ()
    return Accepted(job_id=job_id, position=position, replayed=replayed, limits=limits)


def _states(meters: list[Any], now: int) -> tuple[LimitState, ...]:
    """From `limit, theoretical arrival time or empty, …` in the order of `METERS`."""
    pairs_ = zip(meters[::2], meters[1::2], strict=True)
    return tuple(
        limit_state(scope, kind, limit, float(at) if at else None, now)
        for (scope, kind), (limit, at) in zip(METERS, pairs_, strict=True)
        if limit
    )


def _told(job: Job, outcome: Outcome) -> bytes:
    """Members of the last message that spare a waiting caller the reading of the record.

    Streams have told their text already; what is large is read by those who want it.
    """
    output = outcome.output
    if outcome.status is not Status.COMPLETED or output is None or job.stream:
        return b""
    if len(output) > MOST_TOLD_BYTES:
        return b""
    members = orjson.dumps(
        {
            "created_ms": job.created_ms,
            "started_ms": job.started_ms,
            "output": output.decode(errors="replace"),
        }
    )
    return b"," + members[1:-1]
