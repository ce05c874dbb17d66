"""What is known of stored files, in the database: owner, name, purpose, size, expiry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Engine, Select, delete, func, select, tuple_
from sqlalchemy.orm import Session

from api.accounts.database import reading, writing
from api.accounts.errors import AccountsError
from api.accounts.tables import BatchRow, FileRow, TenantRow

#: States of a batch that still reads its input.
READING: Final = ("validating", "in_progress", "finalizing", "cancelling")


class FileInUseError(AccountsError):
    """A batch that has not ended reads this file."""


class QuotaError(AccountsError):
    """The tenant's files would be larger than it may have."""


class UnknownCursorError(AccountsError):
    """A page is to begin after something that the tenant doesn't have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file as its owner knows it. Times are in UTC."""

    #: `file-…`; also its name in the file store.
    id: str
    tenant: str
    filename: str
    #: `batch`, `batch_output` or `user_data`.
    purpose: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None = None


class FileRecords:
    """Blocking and thread-safe. Every call may raise `DatabaseUnavailableError`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, file: StoredFile, *, quota_bytes: int) -> None:
        """Raises `QuotaError`; then nothing was written."""
        with writing(self._engine) as connection, Session(connection) as session:
            # The tenant's row puts its uploads in line, so that two can't share what is left.
            session.execute(
                select(TenantRow.id).where(TenantRow.id == file.tenant).with_for_update()
            )
            if _usage(session, file.tenant) + file.bytes > quota_bytes:
                raise QuotaError
            session.add(file_row(file))
            session.flush()

    def usage(self, tenant: str) -> int:
        """Bytes of all files of the tenant."""
        with reading(self._engine) as connection, Session(connection) as session:
            return _usage(session, tenant)

    def get(self, file_id: str, *, tenant: str, now: datetime) -> StoredFile | None:
        """None as well when it is another tenant's, or expired."""
        with reading(self._engine) as connection, Session(connection) as session:
            row = session.scalar(_owned(file_id, tenant))
            if row is None or (row.expires_at is not None and row.expires_at <= now):
                return None
            return _file(row)

    def page(
        self,
        tenant: str,
        *,
        now: datetime,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
    ) -> tuple[list[StoredFile], bool]:
        """A page and whether more follow. Raises `UnknownCursorError`."""
        place = tuple_(FileRow.created_at, FileRow.id)
        wanted = select(FileRow).where(
            FileRow.tenant_id == tenant,
            (FileRow.expires_at.is_(None)) | (FileRow.expires_at > now),
        )
        if purpose is not None:
            wanted = wanted.where(FileRow.purpose == purpose)
        with reading(self._engine) as connection, Session(connection) as session:
            if after is not None:
                last = session.scalar(_owned(after, tenant))
                if last is None:
                    raise UnknownCursorError
                here = tuple_(last.created_at, last.id)
                wanted = wanted.where(place < here if newest_first else place > here)
            if newest_first:
                wanted = wanted.order_by(FileRow.created_at.desc(), FileRow.id.desc())
            else:
                wanted = wanted.order_by(FileRow.created_at, FileRow.id)
            rows = session.scalars(wanted.limit(limit + 1)).all()
            return [_file(row) for row in rows[:limit]], len(rows) > limit

    def remove(self, file_id: str, *, tenant: str) -> bool:
        """Whether there was such a file of the tenant. Raises `FileInUseError`."""
        with writing(self._engine) as connection, Session(connection) as session:
            row = session.scalar(_owned(file_id, tenant))
            if row is None:
                return False
            if session.scalar(_readers().where(BatchRow.input_file_id == file_id).limit(1)):
                raise FileInUseError
            session.delete(row)
            session.flush()
            return True

    def remove_expired(self, *, now: datetime, limit: int) -> list[str]:
        """Forget files that have expired, unless a batch still reads them; returns their ids."""
        with writing(self._engine) as connection, Session(connection) as session:
            ids = session.scalars(
                select(FileRow.id)
                .where(FileRow.expires_at <= now, FileRow.id.not_in(_readers()))
                .limit(limit)
            ).all()
            if ids:
                session.execute(delete(FileRow).where(FileRow.id.in_(ids)))
            return list(ids)

    def known(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that stand for a file."""
        with reading(self._engine) as connection, Session(connection) as session:
            return set(session.scalars(select(FileRow.id).where(FileRow.id.in_(ids))))


def file_row(file: StoredFile) -> FileRow:
    return FileRow(
        id=file.id,
        tenant_id=file.tenant,
        filename=file.filename,
        purpose=file.purpose,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
    )


def _file(row: FileRow) -> StoredFile:
    return StoredFile(
        id=row.id,
        tenant=row.tenant_id,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _owned(file_id: str, tenant: str) -> Select[FileRow]:
    return select(FileRow).where(FileRow.id == file_id, FileRow.tenant_id == tenant)


def _readers() -> Select[str]:
    return select(BatchRow.input_file_id).where(BatchRow.status.in_(READING))


def _usage(session: Session, tenant: str) -> int:
    total = session.scalar(select(func.sum(FileRow.bytes)).where(FileRow.tenant_id == tenant))
    return int(total or 0)
