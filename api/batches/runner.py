"""The batches of one API process: claims what nobody drives, and tidies up behind it all."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

from api.accounts.batch import Batch
from api.accounts.batches import BatchRecords
from api.accounts.database import make_engine
from api.accounts.errors import AccountsError
from api.accounts.files import FileRecords
from api.batches.claimed import LeaseLostError, Tools
from api.batches.driver import Driver
from api.batches.results import forget
from api.files.library import FileStoreError, Library
from api.files.store import DiskFileStore, FileStore
from api.metrics import Metrics
from api.ports import Hub, Queue
from broker.errors import BrokerError
from broker.webhooks.outbox import OutboxEvent
from config.catalogue import ModelSpec
from config.logs import get_logger
from config.settings import Files as FileSettings
from config.settings import Settings, SettingsError

log = get_logger(__name__)

#: A batch whose driver failed isn't taken again before this.
_AGAIN_S: Final = 10.0
#: Between two looks for what has expired or was left behind, about.
_TIDY_S: Final = 600.0
#: Ends of batches told to webhooks at once.
_TELL: Final = 100
#: Longest a stop waits for drivers to write what they have, and for the database.
_STOP_S: Final = 3.0
#: Results of batches that ended or are unknown are dropped after this long.
_LEFT_BEHIND_S: Final = 3600.0


class BatchRunner:
    """One per process."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._settings = tools.settings.batches
        self._owner = f"{socket.gethostname()[:32]}:{os.getpid()}:{os.urandom(4).hex()}"
        self._drivers: dict[str, Driver] = {}
        self._driving: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failing = False
        #: Webhooks couldn't be told the last time.
        self._untold = False

    @property
    def records(self) -> BatchRecords:
        return self._tools.records

    def look(self) -> None:
        """There may be a batch to drive."""
        self._wake.set()

    def cancel(self, batch_id: str) -> None:
        """The database says so already; a driver in this process needn't find out by itself."""
        if (driver := self._drivers.get(batch_id)) is not None:
            driver.stop("batch_cancelled")
        self._wake.set()

    def progress(self, batch: Batch) -> Batch:
        """With the counts of this moment when it is driven here."""
        driver = self._drivers.get(batch.id)
        if driver is None or driver.batch.epoch != batch.epoch or batch.ended_at is not None:
            return batch
        return replace(batch, completed=driver.results.completed, failed=driver.results.failed)

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._tidy())]
        if self._settings.concurrency:
            self._tasks.append(asyncio.create_task(self._claim()))

    async def stop(self) -> None:
        """Let go of all batches; another process, or the next one here, goes on at once."""
        pending = {*self._tasks, *self._driving}
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                while pending:
                    # Again and again: redis-py loses a cancel that comes with its result.
                    for task in pending:
                        task.cancel()
                    _, pending = await asyncio.wait(pending, timeout=0.1)

    async def _claim(self) -> None:
        while True:
            self._wake.clear()
            await self._tell()
            while len(self._driving) < self._settings.concurrency:
                if not await self._claim_one():
                    break
            with suppress(TimeoutError):
                # Not all processes at the same moment.
                async with asyncio.timeout(self._settings.poll_s * random.uniform(0.75, 1.25)):  # noqa: S311
                    await self._wake.wait()

    async def _tell(self) -> None:
        """Have webhooks told of batches that have ended, whoever ended them.

        What dies between the outbox and the note that it is there tells twice, with the same id.
        """
        sql = self._tools.library.sql
        try:
            for batch in await sql(lambda: self.records.untold(limit=_TELL)):
                await self._tools.queue.announce(_end_of(batch))
                await sql(partial(self.records.told, batch.id))
        except (AccountsError, BrokerError) as error:
            if not self._untold:
                log.warning("batches_not_told", why=type(error).__name__)
            self._untold = True
        else:
            self._untold = False

    async def _claim_one(self) -> bool:
        claimed_at = asyncio.get_running_loop().time()
        now = datetime.now(UTC)
        try:
            batch = await self._tools.library.sql(
                lambda: self.records.claim(self._owner, now=now, lease_s=self._settings.lease_s)
            )
        except AccountsError as error:
            if not self._failing:
                log.error("batches_unreachable", why=str(error))
            self._failing = True
            return False
        self._failing = False
        if batch is None:
            return False
        driver = self._drivers[batch.id] = Driver(self._tools, batch, claimed_at=claimed_at)
        task = asyncio.create_task(self._drive(driver))
        self._driving.add(task)
        task.add_done_callback(self._driving.discard)
        log.info("batch_claimed", batch_id=batch.id, status=batch.status, epoch=batch.epoch)
        return True

    async def _drive(self, driver: Driver) -> None:
        batch, results = driver.batch, driver.results
        again_s = 0.0
        try:
            status = await driver.run()
        except asyncio.CancelledError:
            await self._release(batch, again_s)
            raise
        except Exception as error:
            if any(isinstance(each, LeaseLostError) for each in _leaves(error)):
                log.warning("batch_lease_lost", batch_id=batch.id)
                return
            again_s = _AGAIN_S
            if all(isinstance(each, AccountsError | FileStoreError) for each in _leaves(error)):
                causes = sorted({type(each).__name__ for each in _leaves(error)})
                log.error("batch_held_up", batch_id=batch.id, why=causes, again_s=again_s)
            else:
                log.error("batch_driver_failed", batch_id=batch.id, exc_info=error)
            await self._release(batch, again_s)
        else:
            self._tools.metrics.batch_ended(status)
            log.info(
                "batch_ended",
                batch_id=batch.id,
                status=status,
                completed=results.completed,
                failed=results.failed,
            )
        finally:
            if self._drivers.get(batch.id) is driver:
                del self._drivers[batch.id]
            self._wake.set()

    async def _release(self, batch: Batch, again_s: float) -> None:
        until = datetime.now(UTC) + timedelta(seconds=again_s)
        # The lease ends by itself otherwise.
        with suppress(AccountsError):
            await self._tools.library.sql(lambda: self.records.release(batch, until=until))

    async def _tidy(self) -> None:
        """Every now and then; not at once, when there is more to do."""
        while True:
            await asyncio.sleep(_TIDY_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                expired, orphans = await self._tools.library.sql(self.tidy)
            except (AccountsError, FileStoreError) as error:
                log.error("files_not_tidied", why=type(error).__name__)
            else:
                if expired or orphans:
                    log.info("files_tidied", expired=expired, orphans=orphans)

    def tidy(self) -> tuple[int, int]:
        """Blocking: drop what has expired and what crashes left behind; how many of each."""
        counts = self._tools.library.tidy()
        before = datetime.now(UTC).timestamp() - _LEFT_BEHIND_S
        aged = [
            folder
            for folder in self._tools.folder.glob("batch_*")
            if folder.stat().st_mtime < before
        ]
        unfinished = self.records.unfinished([folder.name for folder in aged])
        for folder in aged:
            if folder.name not in unfinished:
                forget(folder)
        return counts


@asynccontextmanager
async def open_storage(
    settings: Settings,
    catalogue: Mapping[str, ModelSpec],
    queue: Queue,
    hub: Hub,
    metrics: Metrics,
) -> AsyncIterator[tuple[Library, BatchRunner]]:
    """Files and batches while the context lasts, on a database engine of their own."""
    folder = Path(settings.files.dir) if settings.files.dir else settings.data_dir / "files"
    store = _store(settings.files, folder)
    engine = make_engine(settings.database)
    library = Library(FileRecords(engine), store, settings.files)
    tools = Tools(
        settings=settings,
        catalogue=catalogue,
        queue=queue,
        hub=hub,
        library=library,
        records=BatchRecords(engine),
        metrics=metrics,
        folder=folder / "batches",
    )
    runner = BatchRunner(tools)
    await runner.start()
    try:
        yield library, runner
    finally:
        await runner.stop()
        library.close()
        engine.dispose()


def _store(settings: FileSettings, folder: Path) -> FileStore:
    """Raises `SettingsError` when the library for a bucket isn't installed."""
    if not settings.url:
        return DiskFileStore(folder)
    try:
        from api.files.s3 import S3FileStore, open_bucket
    except ImportError:
        raise SettingsError(
            "FOREBAY_FILES__URL needs the extra s3: pip install 'forebay[s3]'"
        ) from None
    bucket = open_bucket(
        settings.url,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        key_id=settings.s3_access_key_id,
        secret=settings.s3_secret_access_key.get_secret_value(),
        timeout_s=settings.s3_timeout_s,
    )
    return S3FileStore(bucket, folder)


def _end_of(batch: Batch) -> OutboxEvent:
    ended = batch.ended_at or batch.created_at
    return OutboxEvent(
        type=f"batch.{batch.status}",
        tenant=batch.tenant,
        ms=int(ended.timestamp() * 1000),
        batch=batch.id,
    )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """What a failed group of tasks failed of."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
