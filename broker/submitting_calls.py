"""What is done to jobs from outside, as calls: put in, announce, cancel, erase, retry, replay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

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
from broker.jobs import Accepted, Band, NewJob
from broker.limits import METERS, NO_LIMITS, LimitState, Scope
from broker.limits import state as limit_state
from broker.policies import shedding_marks
from broker.queue import CancelResult
from broker.reading_calls import ReadingCalls
from broker.stats import QueueMode
from broker.webhooks.outbox import OutboxEvent
from broker.wire import Arg
from config.settings import Queue as QueueSettings

#: Jobs cancelled, and put in again, by one script call.
CANCEL_BATCH = 500
REPLAY_BATCH = 100

_CANCEL_RESULTS: tuple[CancelResult, ...] = ("cancelled", "cancelling", "terminal")


class SubmittingCalls(ReadingCalls):
    """Calls of those who have jobs, and of those who operate; no I/O."""

    def __init__(self, settings: QueueSettings) -> None:
        super().__init__(settings)
        self._marks = shedding_marks(settings)
        self._cap = settings.default_max_in_flight
        self._max_queued = settings.default_max_queued
        self._replicas = settings.await_replicas

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
        """The error for what `refusal` (broker/lua/_intake.lua) returns."""
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
