"""Takes one claimed batch from where it stands to its end.

Every step can be repeated by another process: jobs of lines have fixed ids, so a line that was put
in is found again; what was collected is on disk; and the end is one fenced transaction.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

import orjson

from api.accounts.batches import Batch, BatchRecords
from api.accounts.errors import AccountsError
from api.accounts.files import StoredFile
from api.batches.lines import LineChecker, LineReader, RawLine, Request, Validation, line_job
from api.batches.results import Results, forget, refused, result_of, undone
from api.delivery.following import QUEUED_SEQ, Follower, final_record
from api.errors import ApiError
from api.files.ids import line_job_id, result_file_id
from api.files.library import FileStoreError, Library
from api.files.store import ObjectMissingError
from api.metrics import Metrics
from api.ports import Hub, Queue
from broker.errors import (
    BrokerUnavailableError,
    DuplicateJobError,
    JobNotFoundError,
    QueueDrainingError,
    QueueFullError,
)
from broker.jobs import Job, NewJob, Status
from config.catalogue import ModelSpec
from config.logs import get_logger
from config.settings import Settings

log = get_logger(__name__)

T = TypeVar("T")

#: Read from the input at once.
_PIECE: Final = 256 * 1024
#: The event loop is held for this long by checks of lines, and then left alone for as long.
_SLICE_S: Final = 0.002
#: Results are written after this long at the latest.
_FLUSH_S: Final = 0.5
#: Pauses while the queue can't be reached, doubled up to the second value.
_RETRY_S: Final = (0.25, 5.0)
#: Longest pause of the feeding after the queue had no room.
_LONGEST_PAUSE_S: Final = 10.0
#: Jobs cancelled by one call.
_CANCELS: Final = 500
#: Longest wait for a running job to heed its cancel; its worker may be gone.
_STOP_S: Final = 30.0
#: Longest wait for the record of a job that is known to have ended.
_RECORD_S: Final = 30.0
#: Times a job that vanished is put in again.
_MAX_VANISHED: Final = 3


class LeaseLostError(Exception):
    """Another process drives the batch, or may do so by now."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all drivers of a process share."""

    settings: Settings
    catalogue: Mapping[str, ModelSpec]
    queue: Queue
    hub: Hub
    library: Library
    records: BatchRecords
    metrics: Metrics
    #: Of the results that are being gathered.
    folder: Path


class Driver:
    """One claim of one batch."""

    def __init__(self, tools: Tools, batch: Batch, *, claimed_at: float) -> None:
        self._tools = tools
        self.batch = batch
        self._lease_s = tools.settings.batches.lease_s
        #: By this process's clock; nothing is put in after it.
        self._lease_until = claimed_at + self._lease_s
        self._stop_code: str | None = None
        #: Set when lines are to be stopped.
        self._stopping = asyncio.Event()
        self._checker = LineChecker(
            batch.endpoint,
            tools.catalogue,
            max_line_bytes=tools.settings.api.max_body_bytes,
        )
        self.results = Results(tools.folder / batch.id, batch.epoch)
        #: Jobs of this batch aren't put in before this moment: the queue had no room.
        self._not_before = 0.0
        #: All lines are known to be valid.
        self._valid = batch.in_progress_at is not None
        if batch.status == "cancelling":
            self.stop("batch_cancelled")

    def stop(self, code: str) -> None:
        """End it without the lines that are not done; `batch_cancelled` or `batch_expired`."""
        self._stop_code = self._stop_code or code
        self._stopping.set()

    async def run(self) -> str:
        """The status it ended in. Raises `LeaseLostError`, and what the tools raise."""
        renewing = asyncio.create_task(self._keep_lease())
        driving = asyncio.create_task(self._drive())
        try:
            await asyncio.wait({renewing, driving}, return_when=asyncio.FIRST_COMPLETED)
            if not driving.done():
                await renewing
            return await driving
        finally:
            for task in (renewing, driving):
                task.cancel()
            await asyncio.gather(renewing, driving, return_exceptions=True)
            # What was collected is worth keeping, whatever happened.
            with suppress(FileStoreError):
                await self.results.flush()

    async def _drive(self) -> str:
        batch, tools = self.batch, self._tools
        if batch.status == "validating" and not self._stopping.is_set():
            problems = await self._validate()
            if problems:
                failed = await self._sql(
                    lambda: tools.records.fail(batch, problems, now=datetime.now(UTC))
                )
                if not failed:
                    raise LeaseLostError
                return "failed"
        await asyncio.to_thread(self.results.load)
        if not self._stopping.is_set():
            await self._work()
        # Of an input that wasn't checked to its end there is nothing to tell.
        if self._stopping.is_set() and self._valid:
            await self._stop_lines()
        return await self._finish()

    # -- validating -----------------------------------------------------------------------------
    async def _validate(self) -> list[dict[str, object]]:
        validation = Validation(self._checker, max_lines=self._tools.settings.batches.max_lines)
        try:
            async for line in self._lines():
                validation.take(line)
                if validation.over or self._stopping.is_set():
                    break
        except ObjectMissingError:
            return [
                {"code": "file_not_found", "line": None, "message": "The input file is gone.",
                 "param": "input_file_id"}
            ]  # fmt: skip
        if self._stopping.is_set():
            return []
        validation.end()
        if validation.problems:
            return validation.problems
        now, total = datetime.now(UTC), validation.total
        if not await self._sql(lambda: self._tools.records.begin(self.batch, now=now, total=total)):
            raise LeaseLostError
        self._valid = True
        return []

    async def _lines(self) -> AsyncIterator[RawLine]:
        """All lines, at a pace that leaves half of this process's time to others."""
        loop = asyncio.get_running_loop()
        file = await asyncio.to_thread(self._tools.library.store.open, self.batch.input_file_id)
        try:
            reader = LineReader(file, max_line_bytes=self._tools.settings.api.max_body_bytes)
            began = loop.time()
            while some := await asyncio.to_thread(reader.some, _PIECE):
                began = loop.time()
                for line in some:
                    yield line
                    if (took := loop.time() - began) > _SLICE_S:
                        await asyncio.sleep(min(took, 0.05))
                        began = loop.time()
        finally:
            file.close()

    # -- running --------------------------------------------------------------------------------
    async def _work(self) -> None:
        """Run every line that isn't done; returns early when the batch is to be stopped."""
        slots = asyncio.Semaphore(self.batch.window)
        async with self._flushing(), asyncio.TaskGroup() as running:
            tasks: set[asyncio.Task[None]] = set()
            ending = running.create_task(self._cancel_when_stopping(tasks))
            async for line in self._lines():
                if line.number in self.results.done:
                    continue
                await slots.acquire()
                if self._stopping.is_set():
                    break
                task = running.create_task(self._run_line(line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: slots.release())
            while tasks:
                await asyncio.wait(tuple(tasks))
            ending.cancel()

    async def _cancel_when_stopping(self, tasks: set[asyncio.Task[None]]) -> None:
        """Let go of the lines: their jobs are then looked up and cancelled in bulk."""
        await self._stopping.wait()
        while tasks:
            for task in tuple(tasks):
                task.cancel()
            await asyncio.wait(tuple(tasks), timeout=0.1)

    async def _run_line(self, line: RawLine) -> None:
        try:
            request = self._checker.check(line)
        except ApiError as error:
            # Valid when the batch began: the catalogue has changed since.
            job_id = line_job_id(self.batch.id, line.number)
            await self._add_refusal(line, error, job_id)
            return
        job = self._job(request)
        record = await self._done(job)
        await self._collect(request, record)

    async def _add_refusal(self, line: RawLine, error: ApiError, job_id: str) -> None:
        request_id = "req_" + job_id.removeprefix("job_")
        result = refused(self.batch, line.number, _custom_id(line), error, request_id)
        await self.results.add(result)
        self._tools.metrics.batch_line_collected(self.batch.endpoint, completed=False)

    async def _collect(self, request: Request, record: Job) -> None:
        result = result_of(self.batch, request.number, request.custom_id, record)
        await self.results.add(result)
        self._tools.metrics.batch_line_collected(self.batch.endpoint, completed=result.ok)

    def _job(self, request: Request) -> NewJob:
        settings = self._tools.settings
        return line_job(
            self.batch,
            request,
            max_attempts=settings.queue.max_attempts,
            result_ttl_s=settings.batches.result_ttl_s,
        )

    async def _done(self, job: NewJob) -> Job:
        """The record of the line's job when it has ended: put in, or found, and waited for."""
        pause, vanished = _RETRY_S[0], 0
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
                pause = min(pause * 2, _RETRY_S[1])
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
            if loop.time() > self._lease_until:
                raise LeaseLostError
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

    # -- stopping -------------------------------------------------------------------------------
    async def _stop_lines(self) -> None:
        """Cancel whatever may be in the queues; what is done by then stays done."""
        code = self._stop_code or "batch_cancelled"
        waiting: list[RawLine] = []
        try:
            async for line in self._lines():
                if line.number not in self.results.done:
                    waiting.append(line)
                if len(waiting) >= _CANCELS:
                    await self._stop_some(waiting, code)
                    waiting = []
            await self._stop_some(waiting, code)
        except ObjectMissingError:
            log.error("batch_input_missing", batch_id=self.batch.id)
        await self.results.flush()

    async def _stop_some(self, lines: list[RawLine], code: str) -> None:
        ids = {line_job_id(self.batch.id, line.number): line for line in lines}
        tenant = self.batch.tenant
        outcome = await self._patiently(
            lambda: self._tools.queue.cancel_many(list(ids), tenant=tenant)
        )
        stopping = [job_id for job_id in ids if outcome.get(job_id) in ("cancelling", "terminal")]
        records = await asyncio.gather(*(self._stopped(job_id) for job_id in stopping))
        ended = {record.id: record for record in records if record is not None}
        for job_id, line in ids.items():
            record = ended.get(job_id)
            # What ran to its end counts; what was cut off has no result.
            if record is not None and record.status in (Status.COMPLETED, Status.FAILED):
                result = result_of(self.batch, line.number, _custom_id(line), record)
            else:
                result = undone(self.batch, line.number, _custom_id(line), code)
            await self.results.add(result)
            self._tools.metrics.batch_line_collected(self.batch.endpoint, completed=result.ok)

    async def _stopped(self, job_id: str) -> Job | None:
        """The record of a job that ends now; None when it doesn't, or is gone."""
        try:
            async with asyncio.timeout(_STOP_S), self._tools.hub.subscribe(job_id) as subscription:
                follower = Follower(self._tools.queue, subscription, job_id, from_log=True)
                await follower.terminal(within_s=_STOP_S)
                record = await final_record(self._tools.queue, job_id, within_s=_STOP_S)
        except (TimeoutError, JobNotFoundError, BrokerUnavailableError):
            return None
        return record if record.is_terminal else None

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        pause = _RETRY_S[0]
        while True:
            try:
                return await call()
            except BrokerUnavailableError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _RETRY_S[1])

    # -- finishing ------------------------------------------------------------------------------
    async def _finish(self) -> str:
        batch, tools, library = self.batch, self._tools, self._tools.library
        await self.results.flush()
        if not await self._sql(lambda: tools.records.finalizing(batch, now=datetime.now(UTC))):
            raise LeaseLostError
        merged = await asyncio.to_thread(self.results.merge, library.store)
        try:
            now = datetime.now(UTC)
            expires_at = now + timedelta(seconds=batch.output_ttl_s) if batch.output_ttl_s else None
            files: list[StoredFile | None] = []
            for kind, draft, size in (
                ("output", merged.output, merged.output_bytes),
                ("error", merged.errors, merged.errors_bytes),
            ):
                if not size:
                    files.append(None)
                    continue
                file = StoredFile(
                    id=result_file_id(batch.id, kind),
                    tenant=batch.tenant,
                    filename=f"{batch.id}_{kind}.jsonl",
                    purpose="batch_output",
                    bytes=size,
                    created_at=now,
                    expires_at=expires_at,
                )
                await asyncio.to_thread(library.store.keep, draft, file.id)
                files.append(file)
            wanted = "expired" if self._stop_code == "batch_expired" else "completed"
            status = await self._sql(
                lambda: tools.records.finish(
                    batch,
                    "cancelled" if self._stop_code == "batch_cancelled" else wanted,
                    now=now,
                    output=files[0],
                    errors=files[1],
                    completed=merged.completed,
                    failed=merged.failed,
                )
            )
        finally:
            for draft in (merged.output, merged.errors):
                await asyncio.to_thread(library.store.discard, draft)
        if status is None:
            raise LeaseLostError
        await asyncio.to_thread(forget, tools.folder / batch.id)
        return status

    # -- lease ----------------------------------------------------------------------------------
    async def _keep_lease(self) -> None:
        """Renew until cancelled; hears of a cancel, and sees the end of the window."""
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            if datetime.now(UTC) >= self.batch.expires_at:
                self.stop("batch_expired")
            try:
                status = await self._sql(self._renew)
            except AccountsError:
                # The database may be back before the lease ends.
                if loop.time() > self._lease_until:
                    raise
            else:
                if status is None:
                    raise LeaseLostError
                self._lease_until = asked + self._lease_s
                if status == "cancelling":
                    self.stop("batch_cancelled")
            await asyncio.sleep(self._lease_s / 5)

    def _renew(self) -> str | None:
        return self._tools.records.renew(
            self.batch,
            now=datetime.now(UTC),
            lease_s=self._lease_s,
            completed=self.results.completed,
            failed=self.results.failed,
        )

    @asynccontextmanager
    async def _flushing(self) -> AsyncIterator[None]:
        """Results reach the disk every now and then; a disk that fails ends the block."""

        async def flush() -> None:
            while True:
                await asyncio.sleep(_FLUSH_S)
                await self.results.flush()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(flush())
            yield
            task.cancel()

    async def _sql(self, call: Callable[[], T]) -> T:
        return await self._tools.library.sql(call)


def _custom_id(line: RawLine) -> str:
    """Of a line that is known to be valid."""
    return str(orjson.loads(line.text)["custom_id"])
