"""One claim of one batch, as the parts of its driver share it: the lease, and the input's lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from api.accounts.batch import Batch
from api.accounts.batches import BatchRecords
from api.accounts.errors import AccountsError
from api.batches.lines import LineChecker, LineReader, RawLine
from api.batches.results import Result, Results
from api.files.library import Library
from api.metrics import Metrics
from api.ports import Hub, Queue
from config.catalogue import ModelSpec
from config.settings import Settings

T = TypeVar("T")

#: Read from the input at once.
_PIECE: Final = 256 * 1024
#: The event loop is held for this long by checks of lines, and then left alone for as long.
_SLICE_S: Final = 0.002


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


class ClaimedBatch:
    """A batch while this process drives it."""

    def __init__(self, tools: Tools, batch: Batch, *, claimed_at: float) -> None:
        self.tools = tools
        self.batch = batch
        self.results = Results(tools.folder / batch.id, batch.epoch)
        self.checker = LineChecker(
            batch.endpoint, tools.catalogue, max_line_bytes=tools.settings.api.max_body_bytes
        )
        #: Set when lines are to be stopped; `stop_code` says why.
        self.stopping = asyncio.Event()
        self.stop_code: str | None = None
        self._lease_s = tools.settings.batches.lease_s
        #: By this process's clock; nothing is put in after it.
        self._lease_until = claimed_at + self._lease_s

    def stop(self, code: str) -> None:
        """End it without the lines that are not done; `batch_cancelled` or `batch_expired`."""
        self.stop_code = self.stop_code or code
        self.stopping.set()

    async def sql(self, call: Callable[[], T]) -> T:
        return await self.tools.library.sql(call)

    async def add(self, result: Result) -> None:
        """A line has ended."""
        await self.results.add(result)
        self.tools.metrics.batch_line_collected(self.batch.endpoint, completed=result.ok)

    async def lines(self) -> AsyncIterator[RawLine]:
        """All lines, at a pace that leaves half of this process's time to others.

        Raises `ObjectMissingError` and other `FileStoreError`.
        """
        loop = asyncio.get_running_loop()
        file = await asyncio.to_thread(self.tools.library.store.open, self.batch.input_file_id)
        try:
            reader = LineReader(file, max_line_bytes=self.tools.settings.api.max_body_bytes)
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

    def check_lease(self) -> None:
        """Raises `LeaseLostError` when another process may drive the batch by now."""
        if asyncio.get_running_loop().time() > self._lease_until:
            raise LeaseLostError

    async def keep_lease(self) -> None:
        """Renew until cancelled; hears of a cancel, and sees the end of the window."""
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            if datetime.now(UTC) >= self.batch.expires_at:
                self.stop("batch_expired")
            try:
                status = await self.sql(self._renew)
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
        return self.tools.records.renew(
            self.batch,
            now=datetime.now(UTC),
            lease_s=self._lease_s,
            completed=self.results.completed,
            failed=self.results.failed,
        )
