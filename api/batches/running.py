"""Runs the lines of a batch: so many jobs at a time, each put in once and waited for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from api.batches.claimed import ClaimedBatch
from api.batches.lines import RawLine, Request, line_job
from api.batches.results import refused, result_of
from api.delivery.following import QUEUED_SEQ, Follower, final_record
from api.errors import ApiError
from api.files.ids import line_job_id
from broker.errors import (
    BrokerUnavailableError,
    DuplicateJobError,
    JobNotFoundError,
    QueueDrainingError,
    QueueFullError,
)
from broker.jobs import Job, NewJob

#: Results are written after this long at the latest.
_FLUSH_S: Final = 0.5
#: Pauses while the queue can't be reached, doubled up to the second value.
RETRY_S: Final = (0.25, 5.0)
#: Longest pause of the feeding after the queue had no room.
_LONGEST_PAUSE_S: Final = 10.0
#: Longest wait for the record of a job that is known to have ended.
_RECORD_S: Final = 30.0
#: Times a job that vanished is put in again.
_MAX_VANISHED: Final = 3


class LineRunner:
    """The running lines of one claimed batch."""

    def __init__(self, claimed: ClaimedBatch) -> None:
        self._claimed = claimed
        self._tools = claimed.tools
        self._batch = claimed.batch
        #: Jobs of this batch aren't put in before this moment: the queue had no room.
        self._not_before = 0.0

    async def run(self) -> None:
        """Run every line that isn't done; returns early when the batch is to be stopped."""
        claimed = self._claimed
        slots = asyncio.Semaphore(self._batch.window)
        async with self._flushing(), asyncio.TaskGroup() as running:
            tasks: set[asyncio.Task[None]] = set()
            ending = running.create_task(self._let_go_when_stopping(tasks))
            async for line in claimed.lines():
                if line.number in claimed.results.done:
                    continue
                await slots.acquire()
                if claimed.stopping.is_set():
                    break
                task = running.create_task(self._run_line(line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: slots.release())
            while tasks:
                await asyncio.wait(tuple(tasks))
            ending.cancel()

    async def _let_go_when_stopping(self, tasks: set[asyncio.Task[None]]) -> None:
        """Let go of the lines: their jobs are then looked up and cancelled in bulk."""
        await self._claimed.stopping.wait()
        while tasks:
            for task in tuple(tasks):
                task.cancel()
            await asyncio.wait(tuple(tasks), timeout=0.1)

    async def _run_line(self, line: RawLine) -> None:
        claimed = self._claimed
        try:
            request = claimed.checker.check(line)
        except ApiError as error:
            custom_id = claimed.checker.open(line).custom_id
            request_id = "req_" + line_job_id(self._batch.id, line.number).removeprefix("job_")
            await claimed.add(refused(self._batch, line.number, custom_id, error, request_id))
            return
        record = await self._done(self._job(request))
        await claimed.add(result_of(self._batch, request.number, request.custom_id, record))

    def _job(self, request: Request) -> NewJob:
        settings = self._tools.settings
        return line_job(
            self._batch,
            request,
            max_attempts=settings.queue.max_attempts,
            result_ttl_s=settings.batches.result_ttl_s,
        )

    async def _done(self, job: NewJob) -> Job:
        """The record of the line's job when it has ended: put in, or found, and waited for."""
        pause, vanished = RETRY_S[0], 0
        while True:
            try:
                async with self._tools.hub.subscribe(job.id) as subscription:
                    found = not await self._put_in(job)
                    follower = Follower(
                        self._tools.queue,
                        subscription,
                        job.id,
                        after=0 if found else QUEUED_SEQ,
                        from_log=found,
                    )
                    while not await follower.terminal(within_s=60):
                        pass
                return await final_record(self._tools.queue, job.id, within_s=_RECORD_S)
            except BrokerUnavailableError:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, RETRY_S[1])
            except JobNotFoundError:
                # Its record has expired or was deleted before it was read.
                vanished += 1
                if vanished > _MAX_VANISHED:
                    raise

    async def _put_in(self, job: NewJob) -> bool:
        """False: it was there already. Waits as long as the queue has no room."""
        loop = asyncio.get_running_loop()
        while True:
            if (wait_s := self._not_before - loop.time()) > 0:
                # Not all at the same moment.
                await asyncio.sleep(wait_s * random.uniform(1.0, 1.5))  # noqa: S311
                continue
            self._claimed.check_lease()
            try:
                await self._tools.queue.enqueue(job)
            except DuplicateJobError:
                return False
            except QueueFullError as error:
                self._pause(error.retry_after_ms / 1000)
            except QueueDrainingError:
                self._pause(_LONGEST_PAUSE_S)
            else:
                self._tools.metrics.job_submitted(job.model, job.endpoint, job.band)
                return True

    def _pause(self, wait_s: float) -> None:
        until = asyncio.get_running_loop().time() + min(max(wait_s, 0.5), _LONGEST_PAUSE_S)
        self._not_before = max(self._not_before, until)

    @asynccontextmanager
    async def _flushing(self) -> AsyncIterator[None]:
        """Results reach the disk every now and then; a disk that fails ends the block."""

        async def flush() -> None:
            while True:
                await asyncio.sleep(_FLUSH_S)
                await self._claimed.results.flush()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(flush())
            yield
            task.cancel()
