"""Files in a bucket of an S3-compatible store; written to a local draft first.

Every call is blocking. Memory is bounded whatever a file's size: it goes up in parts and comes down
in pieces. An upload becomes visible as a whole or not at all; one that is broken off can leave
parts that nobody sees and that a lifecycle rule of the bucket should drop.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import obstore
from obstore.exceptions import BaseError, NotFoundError

from api.files.store import Drafts, FileStoreError, ObjectMissingError, checked_id, translated

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import S3Store

#: Sent at once, by so many connections: what an upload holds in memory.
_PART: Final = 8 * 1024 * 1024
_PARTS_AT_ONCE: Final = 2
#: Read at once: what a download holds in memory.
_PIECE: Final = 1024 * 1024
#: Names asked for at once.
_PAGE: Final = 1000


class S3FileStore(Drafts):
    """`<prefix>/<id>` in a bucket, drafts in a local folder."""

    def __init__(self, store: S3Store, folder: Path) -> None:
        super().__init__(folder)
        self._store = store

    def keep(self, draft: Path, file_id: str) -> None:
        name = checked_id(file_id)
        with _told(missing=False):
            obstore.put(self._store, name, draft, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)
        self.discard(draft)

    def open(self, file_id: str) -> BinaryIO:
        name = checked_id(file_id)
        with _told():
            size = obstore.head(self._store, name)["size"]
        return cast(BinaryIO, io.BufferedReader(_Object(self._store, name, size), _PIECE))

    def remove(self, file_id: str) -> None:
        try:
            with _told():
                obstore.delete(self._store, checked_id(file_id))
        except ObjectMissingError:
            pass

    def older_than(self, age_s: float) -> list[str]:
        before = datetime.now(UTC) - timedelta(seconds=age_s)
        found: list[str] = []
        with _told(missing=False):
            for page in obstore.list(self._store, chunk_size=_PAGE):
                found += [each["path"] for each in page if each["last_modified"] < before]
        # Whatever else lies below the prefix isn't ours, and what is told here may be removed.
        return [name for name in found if name.startswith("file-") and "/" not in name]


class _Object(io.RawIOBase):
    """An object as a file to read, by ranges."""

    def __init__(self, store: S3Store, name: str, size: int) -> None:
        self._store = store
        self._name = name
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        length = min(len(room), self._size - self._at)
        if length <= 0:
            return 0
        with _told():
            data = obstore.get_range(self._store, self._name, start=self._at, length=length)
        room[: len(data)] = memoryview(data)
        self._at += len(data)
        return len(data)


def open_bucket(
    url: str, *, endpoint: str, region: str, key_id: str, secret: str, timeout_s: float
) -> S3Store:
    """A bucket by `s3://bucket/prefix`; looks at nothing yet.

    Without `key_id` credentials come from where AWS's own tools look: variables, files of a web
    identity, the metadata of a container or machine.
    """
    from obstore.store import S3Store

    options: dict[str, Any] = {"region": region}
    if endpoint:
        options["endpoint"] = endpoint
    if key_id:
        options |= {"access_key_id": key_id, "secret_access_key": secret}
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return S3Store(
        bucket,
        prefix=prefix.strip("/") or None,
        client_options={
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=min(timeout_s, 5.0)),
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=2 * timeout_s)},
        **options,
    )


@contextmanager
def _told(*, missing: bool = True) -> Iterator[None]:
    """Errors of the store as `FileStoreError`; its own words may hold names and addresses.

    `missing`: what isn't found is the object, and not its bucket.
    """
    try:
        with translated():
            yield
    except (NotFoundError, FileNotFoundError) as error:
        if missing:
            raise ObjectMissingError("no such object") from None
        raise FileStoreError(type(error).__name__) from None
    except BaseError as error:
        raise FileStoreError(type(error).__name__) from None
