"""Where the bytes of files are: a small protocol, and the folder that keeps it.

The other one that ships is a bucket (`api/files/s3.py`).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol

#: Ids become names of files.
_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FileStoreError(Exception):
    """The store can't be used now."""


class StorageFullError(FileStoreError):
    """There is no room left; nothing was kept."""


class ObjectMissingError(FileStoreError):
    """The store has no object of this id."""


class FileStore(Protocol):
    """Blocking and thread-safe: called in threads. Any call may raise `FileStoreError`."""

    def create(self) -> Path:
        """A new empty local file to write to, for `keep` or `discard`."""
        ...

    def keep(self, draft: Path, file_id: str) -> None:
        """Make a written file durable under its id, as a whole; replaces what is there."""
        ...

    def discard(self, draft: Path) -> None:
        """Drop a file that was not kept."""
        ...

    def open(self, file_id: str) -> BinaryIO:
        """For reading, from any place. Raises `ObjectMissingError`."""
        ...

    def remove(self, file_id: str) -> None:
        """One that isn't there is removed already."""
        ...

    def older_than(self, age_s: float) -> list[str]:
        """Ids of objects that were kept longer ago."""
        ...

    def clean(self, age_s: float) -> int:
        """Drop files of `create` whose writer is long gone; returns how many."""
        ...


class Drafts:
    """Local files that are being written: `drafts/` in a folder, readable by the owner only."""

    def __init__(self, folder: Path) -> None:
        self._drafts = folder / "drafts"

    def create(self) -> Path:
        with translated():
            self._drafts.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = self._drafts / secrets.token_hex(12)
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return draft

    def discard(self, draft: Path) -> None:
        with translated():
            draft.unlink(missing_ok=True)

    def clean(self, age_s: float) -> int:
        stale = _aged(self._drafts, age_s)
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)


class DiskFileStore(Drafts):
    """Files in a folder: `objects/<id>`, and `drafts/` while written.

    A file is synced before it gets its name, so that a name stands for the whole content even
    after a power cut.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._objects = folder / "objects"

    def keep(self, draft: Path, file_id: str) -> None:
        with translated():
            self._objects.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(self._path(file_id))
            _sync_folder(self._objects)

    def open(self, file_id: str) -> BinaryIO:
        try:
            with translated():
                return self._path(file_id).open("rb")
        except FileNotFoundError:
            raise ObjectMissingError(file_id) from None

    def remove(self, file_id: str) -> None:
        with translated():
            self._path(file_id).unlink(missing_ok=True)

    def older_than(self, age_s: float) -> list[str]:
        return [path.name for path in _aged(self._objects, age_s)]

    def _path(self, file_id: str) -> Path:
        return self._objects / checked_id(file_id)


def checked_id(file_id: str) -> str:
    """The id, if it may be a name in a store. Raises `ObjectMissingError`: nothing has another."""
    if not _ID.fullmatch(file_id):
        raise ObjectMissingError(file_id)
    return file_id


@contextmanager
def translated() -> Iterator[None]:
    """Operating system errors as `FileStoreError`, apart from a missing file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("no room left") from None
        raise FileStoreError(error.strerror or type(error).__name__) from None


def _aged(folder: Path, age_s: float) -> list[Path]:
    before = time.time() - age_s
    found = []
    with translated():
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return []
        for entry in entries:
            try:
                if entry.stat().st_mtime < before:
                    found.append(Path(entry.path))
            except FileNotFoundError:
                continue
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
