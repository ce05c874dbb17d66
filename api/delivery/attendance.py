"""Jobs that somebody waits for: enqueued while the connection listens, cancelled when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from api import keys
from api.delivery.following import QUEUED_SEQ, Follower
from api.ports import Queue
from broker.errors import BrokerError
from broker.jobs import Accepted, NewJob
from config.logs import get_logger

log = get_logger(__name__)


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
    try:
        await queue.cancel(job.id)
    except BrokerError as error:
        log.info("job_not_cancelled", job_id=job.id, reason=type(error).__name__)
    else:
        log.info("job_cancelled", job_id=job.id, reason="caller_left")
