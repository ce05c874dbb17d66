"""How jobs get into the queue, and out of it again when nobody will ask for them.

A job that somebody waits for is enqueued while the connection listens, and cancelled when it
leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from api import keys
from api.delivery.following import QUEUED_SEQ, Follower
from api.ports import Queue
from broker.errors import BrokerError, BrokerUnavailableError
from broker.jobs import Accepted, NewJob
from config.logs import get_logger

log = get_logger(__name__)


async def enqueue(app: web.Application, job: NewJob) -> Accepted:
    """Put a background job in. Raises what the queue raises."""
    queue = app[keys.QUEUE]
    try:
        return await queue.enqueue(job)
    except BrokerUnavailableError:
        # Only the answer may be lost. The caller is told to try again, and doesn't know the id.
        app[keys.BACKGROUND].spawn(_withdraw(queue, job, "answer_lost"))
        raise


@asynccontextmanager
async def attended(app: web.Application, job: NewJob) -> AsyncIterator[Follower]:
    """Subscribe, enqueue, follow. Left before the job's end, the job is cancelled.

    Raises what `enqueue` raises; then there is no job.
    """
    queue = app[keys.QUEUE]
    async with app[keys.HUB].subscribe(job.id) as subscription:
        follower = Follower(queue, subscription, job.id, after=QUEUED_SEQ)
        # A caller that goes away in the middle of this must not leave a job behind: the call is
        # carried through, and its job cancelled.
        enqueued = asyncio.ensure_future(queue.enqueue(job))
        try:
            await asyncio.shield(enqueued)
            yield follower
        finally:
            if not follower.finished:
                app[keys.BACKGROUND].spawn(_cancel(queue, job, enqueued))


async def _cancel(queue: Queue, job: NewJob, enqueued: asyncio.Future[Accepted]) -> None:
    """End a job whose caller has left."""
    # Refused, there is no job; but when only the answer was lost, it is there all the same.
    with suppress(BrokerError):
        await enqueued
    await _withdraw(queue, job, "caller_left")


async def _withdraw(queue: Queue, job: NewJob, reason: str) -> None:
    try:
        await queue.cancel(job.id)
    except BrokerError as error:
        log.info("job_not_cancelled", job_id=job.id, reason=type(error).__name__)
    else:
        log.info("job_cancelled", job_id=job.id, reason=reason)
