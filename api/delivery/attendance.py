"""How jobs get into the queue, and out of it again when nobody will ask for them.

A job that somebody waits for is enqueued while the connection listens, and cancelled when it
leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web

from api import keys
from api.delivery.following import QUEUED_SEQ, Follower
from api.errors import ApiError
from api.ports import Queue
from broker.errors import BrokerError, BrokerUnavailableError, JobNotFoundError
from broker.jobs import Accepted, Job, NewJob
from broker.limits import LimitState
from config.logs import get_logger

log = get_logger(__name__)


#: Header of an answer that speaks of a job made by an earlier request.
REPLAYED: Final[Mapping[str, str]] = {"Idempotent-Replayed": "true"}


@dataclass(frozen=True, slots=True)
class Attendance:
    """A job that somebody waits for."""

    #: With the id and band that the job really has.
    job: NewJob
    follower: Follower
    #: The rate limits it is under, as they stood after it was taken.
    limits: tuple[LimitState, ...]
    #: It was made by an earlier request with the same idempotency key.
    replayed: bool = False


async def enqueue(app: web.Application, job: NewJob) -> Accepted:
    """Put a background job in. Raises what the queue raises."""
    queue = app[keys.QUEUE]
    try:
        return await queue.enqueue(job)
    except BrokerUnavailableError:
        # Only the answer may be lost. The caller is told to try again: with a key it will find the
        # job; without one it doesn't know of it.
        if not job.idempotency_key:
            app[keys.BACKGROUND].spawn(_withdraw(queue, job, "answer_lost"))
        raise


@asynccontextmanager
async def attended(app: web.Application, job: NewJob) -> AsyncIterator[Attendance]:
    """Subscribe, enqueue, follow. Left before the job's end, the job is cancelled.

    With an id of the hub's own (`Hub.new_job_id`) subscribing takes no round trip.
    Not so with an idempotency key: whoever gave one may come back for the answer.
    Raises what `enqueue` raises; then there is no job. `ApiError` when the key stands for a job
    whose result is gone.
    """
    queue = app[keys.QUEUE]
    async with app[keys.HUB].subscribe(job.id) as subscription:
        follower = Follower(queue, subscription, job.id, after=QUEUED_SEQ)
        # A caller that goes away in the middle of this must not leave a job behind: the call is
        # carried through, and its job cancelled.
        enqueued = asyncio.ensure_future(queue.enqueue(job))
        try:
            accepted = await asyncio.shield(enqueued)
            if accepted.replayed:
                async with _joined(app, job, accepted) as attendance:
                    yield attendance
            else:
                yield Attendance(job, follower, accepted.limits)
        finally:
            if not follower.finished and not job.idempotency_key:
                app[keys.BACKGROUND].spawn(_cancel(queue, job, enqueued))


async def first_record(queue: Queue, job_id: str) -> Job:
    """The job of an earlier request. Raises `ApiError` when it is no longer kept."""
    try:
        job = await queue.get(job_id)
    except JobNotFoundError:
        raise ApiError("result_expired", job_id=job_id) from None
    if job.erased_ms:
        raise ApiError("result_expired", job_id=job_id)
    return job


@asynccontextmanager
async def _joined(
    app: web.Application, job: NewJob, accepted: Accepted
) -> AsyncIterator[Attendance]:
    """Follow the job of an earlier request from its beginning, or find it ended."""
    queue, first_id = app[keys.QUEUE], accepted.job_id
    async with app[keys.HUB].subscribe(first_id) as subscription:
        record = await first_record(queue, first_id)
        follower = Follower(queue, subscription, first_id, from_log=True)
        follower.finished = record.is_terminal
        found = replace(job, id=first_id, band=record.band)
        yield Attendance(found, follower, accepted.limits, replayed=True)


async def _cancel(queue: Queue, job: NewJob, enqueued: asyncio.Future[Accepted]) -> None:
    """End a job whose caller has left."""
    # Refused, there is no job; but when only the answer was lost, it is there all the same.
    with suppress(BrokerError):
        await enqueued
    await _withdraw(queue, job, "caller_left")


async def _withdraw(queue: Queue, job: NewJob, reason: str) -> None:
    try:
        await queue.cancel(job.id)
    except (BrokerUnavailableError, JobNotFoundError) as error:
        # A refused submit has left no job; of its outage the queue tells by itself, once.
        log.debug("job_not_cancelled", job_id=job.id, reason=type(error).__name__)
    except BrokerError as error:
        log.info("job_not_cancelled", job_id=job.id, reason=type(error).__name__)
    else:
        log.info("job_cancelled", job_id=job.id, reason=reason)
