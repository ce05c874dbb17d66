"""Takes one claimed batch from where it stands to its end.

Every step can be repeated by another process: jobs of lines have fixed ids, so a line that was put
in is found again; what was collected is on disk; and the end is one fenced transaction.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime

from api.accounts.batch import Batch
from api.batches.claimed import ClaimedBatch, LeaseLostError, Tools
from api.batches.finishing import finish
from api.batches.results import Results
from api.batches.running import LineRunner
from api.batches.stopping import stop_lines
from api.batches.validating import validate
from api.files.library import FileStoreError


class Driver:
    """One claim of one batch."""

    def __init__(self, tools: Tools, batch: Batch, *, claimed_at: float) -> None:
        self.batch = batch
        self._claimed = ClaimedBatch(tools, batch, claimed_at=claimed_at)
        if batch.status == "cancelling":
            self.stop("batch_cancelled")

    @property
    def results(self) -> Results:
        return self._claimed.results

    def stop(self, code: str) -> None:
        """End it without the lines that are not done; `batch_cancelled` or `batch_expired`."""
        self._claimed.stop(code)

    async def run(self) -> str:
        """The status it ended in. Raises `LeaseLostError`, and what the tools raise."""
        renewing = asyncio.create_task(self._claimed.keep_lease())
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
        claimed, stopping = self._claimed, self._claimed.stopping
        #: All lines can be told apart.
        valid = self.batch.in_progress_at is not None
        if self.batch.status == "validating" and not stopping.is_set():
            begun = await self._begin()
            if begun is False:
                return "failed"
            valid = begun is True
        await asyncio.to_thread(self.results.load)
        if not stopping.is_set():
            await LineRunner(claimed).run()
        # Of an input that wasn't looked through to its end there is nothing to tell.
        if stopping.is_set() and valid:
            await stop_lines(claimed)
        return await finish(claimed)

    async def _begin(self) -> bool | None:
        """Whether its lines may be run, or it has failed; None: it was stopped meanwhile."""
        claimed, batch, records = self._claimed, self.batch, self._claimed.tools.records
        found = await validate(claimed)
        if found is None:
            return None
        now = datetime.now(UTC)
        if found.problems:
            done = await claimed.sql(lambda: records.fail(batch, found.problems, now=now))
        else:
            done = await claimed.sql(
                lambda: records.begin(batch, now=now, total=found.total, model=found.model)
            )
        if not done:
            raise LeaseLostError
        return not found.problems
