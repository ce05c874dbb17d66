"""Files as a whole: their bytes in the store and what is known of them in the database.

Bytes come first and go last, so a crash in between leaves bytes that nobody knows of, never a file
without bytes; `tidy` drops the former.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from api.accounts.files import FileRecords, QuotaError, StoredFile
from api.files.store import FileStore, FileStoreError, StorageFullError, translated
from config.logs import get_logger
from config.settings import Files as FileSettings

log = get_logger(__name__)

T = TypeVar("T")

#: Bytes without a record, and drafts, live this long at least: their upload may be under way.
_ORPHAN_S: Final = 3600.0
#: Records dealt with at once.
_BATCH: Final = 500


class TooLargeError(Exception):
    """More than one file may have."""


class Draft:
    """A file while it is written; counts against its tenant's quota from its first byte on."""

    def __init__(self, library: Library, tenant: str, path: Path, left: int) -> None:
        self._library = library
        self._tenant = tenant
        #: Bytes the tenant had left when it began.
        self._left = left
        self.path = path
        self.bytes = 0

    async def write(self, data: bytes) -> None:
        """Raises `TooLargeError`, `QuotaError` and `FileStoreError`."""
        if self.bytes + len(data) > self._library.settings.max_bytes:
            raise TooLargeError
        pending = self._library.pending
        if pending[self._tenant] + len(data) > self._left:
            raise QuotaError
        self.bytes += len(data)
        pending[self._tenant] += len(data)
        await asyncio.to_thread(self._append, data)

    def _append(self, data: bytes) -> None:
        try:
            with translated(), self.path.open("ab") as file:
                file.write(data)
        except FileNotFoundError:
            raise FileStoreError("the draft is gone") from None


class Library:
    """Every call may raise `FileStoreError` and `AccountsError`."""

    def __init__(self, records: FileRecords, store: FileStore, settings: FileSettings) -> None:
        self.records = records
        self.store = store
        self.settings = settings
        #: Bytes of uploads under way in this process, by tenant.
        self.pending: dict[str, int] = defaultdict(int)
        # Threads of their own: SQL that hangs holds up files and batches, and nothing else.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="storage")

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def sql(self, call: Callable[[], T]) -> T:
        """Run a call on the database in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @asynccontextmanager
    async def draft(self, tenant: str) -> AsyncIterator[Draft]:
        """A file to be written; dropped at the end unless it was kept."""
        used = await self.sql(lambda: self.records.usage(tenant))
        path = await asyncio.to_thread(self.store.create)
        draft = Draft(self, tenant, path, self.settings.quota_bytes - used)
        try:
            yield draft
        finally:
            self.pending[tenant] -= draft.bytes
            if not self.pending[tenant]:
                del self.pending[tenant]
            # Not awaited to its end when the caller has left; a kept draft has moved away.
            await asyncio.to_thread(self.store.discard, path)

    async def keep(self, draft: Draft, file: StoredFile) -> None:
        """Raises `QuotaError`."""
        await asyncio.to_thread(self.store.keep, draft.path, file.id)
        try:
            await self.sql(lambda: self.records.add(file, quota_bytes=self.settings.quota_bytes))
        except QuotaError:
            # After any other failure there may be a record; `tidy` finds out.
            await asyncio.to_thread(self.store.remove, file.id)
            raise

    async def get(self, file_id: str, tenant: str) -> StoredFile | None:
        now = datetime.now(UTC)
        return await self.sql(lambda: self.records.get(file_id, tenant=tenant, now=now))

    async def remove(self, file_id: str, tenant: str) -> bool:
        """Whether there was one. Raises `FileInUseError`."""
        removed = await self.sql(lambda: self.records.remove(file_id, tenant=tenant))
        if removed:
            await asyncio.to_thread(self.store.remove, file_id)
        return removed

    def tidy(self) -> tuple[int, int]:
        """Blocking: drop expired files, and bytes that nobody knows of; how many of each."""
        expired = orphans = 0
        while ids := self.records.remove_expired(now=datetime.now(UTC), limit=_BATCH):
            for file_id in ids:
                self.store.remove(file_id)
            expired += len(ids)
        aged = self.store.older_than(_ORPHAN_S)
        for start in range(0, len(aged), _BATCH):
            some = aged[start : start + _BATCH]
            for file_id in set(some) - self.records.known(some):
                self.store.remove(file_id)
                orphans += 1
        orphans += self.store.clean(max(_ORPHAN_S, 2 * self.settings.upload_timeout_s))
        return expired, orphans


__all__ = ["Draft", "FileStoreError", "Library", "StorageFullError", "TooLargeError"]
