"""Ends the lines of a batch that was cancelled or has run out of time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from api.batches.claimed import ClaimedBatch
from api.batches.lines import RawLine
from api.batches.results import result_of, undone
from api.batches.running import RETRY_S
from api.delivery.following import Follower, final_record
from api.files.ids import line_job_id
from api.files.store import ObjectMissingError
from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.jobs import Job, Status
from config.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

#: Jobs cancelled by one call.
_CANCELS: Final = 500
#: Longest wait for a running job to heed its cancel; its worker may be gone.
_STOP_S: Final = 30.0


async def stop_lines(claimed: ClaimedBatch) -> None:
    """Cancel whatever may be in the queues; what is done by then stays done."""
    waiting: list[RawLine] = []
    try:
        async for line in claimed.lines():
            if line.number not in claimed.results.done:
                waiting.append(line)
            if len(waiting) >= _CANCELS:
                await _stop_some(claimed, waiting)
                waiting = []
        await _stop_some(claimed, waiting)
    except ObjectMissingError:
        log.error("batch_input_missing", batch_id=claimed.batch.id)
    await claimed.results.flush()


async def _stop_some(claimed: ClaimedBatch, lines: list[RawLine]) -> None:
    batch, queue = claimed.batch, claimed.tools.queue
    code = claimed.stop_code or "batch_cancelled"
    ids = {line_job_id(batch.id, line.number): line for line in lines}
    outcome = await _patiently(lambda: queue.cancel_many(list(ids), tenant=batch.tenant))
    stopping = [job_id for job_id in ids if outcome.get(job_id) in ("cancelling", "terminal")]
    records = await asyncio.gather(*(_stopped(claimed, job_id) for job_id in stopping))
    ended = {record.id: record for record in records if record is not None}
    for job_id, line in ids.items():
        record = ended.get(job_id)
        custom_id = claimed.checker.open(line).custom_id
        # What ran to its end counts; what was cut off has no result.
        if record is not None and record.status in (Status.COMPLETED, Status.FAILED):
            await claimed.add(result_of(batch, line.number, custom_id, record))
        else:
            await claimed.add(undone(batch, line.number, custom_id, code))


async def _stopped(claimed: ClaimedBatch, job_id: str) -> Job | None:
    """The record of a job that ends now; None when it doesn't, or is gone."""
    queue, hub = claimed.tools.queue, claimed.tools.hub
    try:
        async with asyncio.timeout(_STOP_S), hub.subscribe(job_id) as subscription:
            follower = Follower(queue, subscription, job_id, from_log=True)
            await follower.terminal(within_s=_STOP_S)
            record = await final_record(queue, job_id, within_s=_STOP_S)
    except (TimeoutError, JobNotFoundError, BrokerUnavailableError):
        return None
    return record if record.is_terminal else None


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Again and again while the queue can't be reached."""
    pause = RETRY_S[0]
    while True:
        try:
            return await call()
        except BrokerUnavailableError:
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_S[1])
