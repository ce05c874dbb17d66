"""Batches in the database: what their owners see, and which process drives which.

A driver holds a lease with an epoch that grows at each claim. What it writes names its epoch, so a
process that was thought dead and comes back changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import orjson
from sqlalchemy import Engine, Select, func, or_, select, tuple_, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from api.accounts.batch import Batch, batch_of
from api.accounts.database import is_missing, reading, writing
from api.accounts.errors import AccountsError, SchemaError
from api.accounts.files import StoredFile, UnknownCursorError, file_row
from api.accounts.tables import BatchRow, FileRow, TenantRow
from broker.jobs import Usage

#: States in which somebody has to drive it.
UNFINISHED: Final = ("validating", "in_progress", "finalizing", "cancelling")
_CANCELLABLE: Final = ("validating", "in_progress", "finalizing")


class TooManyBatchesError(AccountsError):
    """The tenant has as many batches that have not ended as it may have."""


class UnknownInputError(AccountsError):
    """The tenant has no such file of purpose `batch`."""


class BatchRecords:
    """Blocking and thread-safe. Every call may raise `DatabaseUnavailableError`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- for owners -----------------------------------------------------------------------------
    def add(self, batch: Batch, *, max_unfinished: int) -> None:
        """Raises `UnknownInputError` and `TooManyBatchesError`."""
        with writing(self._engine) as connection, Session(connection) as session:
            session.execute(
                select(TenantRow.id).where(TenantRow.id == batch.tenant).with_for_update()
            )
            found = session.scalar(
                select(FileRow).where(
                    FileRow.id == batch.input_file_id,
                    FileRow.tenant_id == batch.tenant,
                    FileRow.purpose == "batch",
                    or_(FileRow.expires_at.is_(None), FileRow.expires_at > batch.created_at),
                )
            )
            if found is None:
                raise UnknownInputError
            unfinished = session.scalar(
                select(func.count())
                .select_from(BatchRow)
                .where(BatchRow.tenant_id == batch.tenant, BatchRow.status.in_(UNFINISHED))
            )
            if (unfinished or 0) >= max_unfinished:
                raise TooManyBatchesError
            session.add(
                BatchRow(
                    id=batch.id,
                    tenant_id=batch.tenant,
                    key_id=batch.key_id,
                    endpoint=batch.endpoint,
                    input_file_id=batch.input_file_id,
                    batch_metadata=orjson.dumps(batch.metadata).decode(),
                    status=batch.status,
                    window=batch.window,
                    output_ttl_s=batch.output_ttl_s,
                    created_at=batch.created_at,
                    expires_at=batch.expires_at,
                    lease_epoch=0,
                )
            )
            session.flush()

    def get(self, batch_id: str, *, tenant: str) -> Batch | None:
        """None as well when it is another tenant's."""
        with reading(self._engine) as connection, Session(connection) as session:
            row = session.scalar(_owned(batch_id, tenant))
            return None if row is None else batch_of(row)

    def page(
        self, tenant: str, *, after: str | None = None, limit: int
    ) -> tuple[list[Batch], bool]:
        """A page, newest first, and whether more follow. Raises `UnknownCursorError`."""
        wanted = select(BatchRow).where(BatchRow.tenant_id == tenant)
        with reading(self._engine) as connection, Session(connection) as session:
            if after is not None:
                last = session.scalar(_owned(after, tenant))
                if last is None:
                    raise UnknownCursorError
                here = tuple_(last.created_at, last.id)
                wanted = wanted.where(tuple_(BatchRow.created_at, BatchRow.id) < here)
            wanted = wanted.order_by(BatchRow.created_at.desc(), BatchRow.id.desc())
            rows = session.scalars(wanted.limit(limit + 1)).all()
            return [batch_of(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, batch_id: str, *, tenant: str, now: datetime) -> Batch | None:
        """Have it cancelled by its driver; one that has ended stays as it is."""
        with writing(self._engine) as connection, Session(connection) as session:
            row = session.scalar(_owned(batch_id, tenant).with_for_update())
            if row is None:
                return None
            if row.status in _CANCELLABLE:
                row.status, row.cancelling_at = "cancelling", now
                session.flush()
            return batch_of(row)

    # -- for drivers ----------------------------------------------------------------------------
    def claim(self, owner: str, *, now: datetime, lease_s: float) -> Batch | None:
        """The oldest batch that nobody drives, of a tenant with fewest driven ones."""
        if is_missing(self._engine):
            raise SchemaError("the accounts database isn't set up")
        # Looked at first without a lock: most looks find nothing.
        with reading(self._engine) as connection, Session(connection) as session:
            candidates = _free(session, now)
        for batch_id in candidates:
            with writing(self._engine) as connection, Session(connection) as session:
                taken = session.execute(
                    update(BatchRow)
                    .where(BatchRow.id == batch_id, *_unclaimed(now))
                    .values(
                        lease_owner=owner,
                        lease_until=now + timedelta(seconds=lease_s),
                        lease_epoch=BatchRow.lease_epoch + 1,
                    )
                )
                if _count(taken):
                    return batch_of(session.get_one(BatchRow, batch_id))
        return None

    def renew(
        self, batch: Batch, *, now: datetime, lease_s: float, completed: int, failed: int
    ) -> str | None:
        """Prolong the lease and tell how far it is; the status, or None when the lease is lost."""
        with writing(self._engine) as connection:
            renewed = connection.execute(
                update(BatchRow)
                .where(*_held(batch))
                .values(
                    lease_until=now + timedelta(seconds=lease_s), completed=completed, failed=failed
                )
                .returning(BatchRow.status)
            )
            return renewed.scalar()

    def begin(self, batch: Batch, *, now: datetime, total: int, model: str | None = None) -> bool:
        """Its lines may be run. False when the lease is lost; one being cancelled stays so."""
        return self._step(
            batch, "validating", "in_progress", in_progress_at=now, total=total, model=model
        )

    def finalizing(self, batch: Batch, *, now: datetime) -> bool:
        return self._step(batch, "in_progress", "finalizing", finalizing_at=now)

    def fail(self, batch: Batch, errors: Sequence[dict[str, Any]], *, now: datetime) -> bool:
        """Its input can't be run."""
        with writing(self._engine) as connection:
            changed = connection.execute(
                update(BatchRow)
                .where(*_held(batch))
                .values(
                    status="failed",
                    ended_at=now,
                    untold=True,
                    errors=orjson.dumps(list(errors)).decode(),
                    lease_owner=None,
                    lease_until=None,
                )
            )
            return bool(_count(changed))

    def finish(
        self,
        batch: Batch,
        status: str,
        *,
        now: datetime,
        output: StoredFile | None,
        errors: StoredFile | None,
        completed: int,
        failed: int,
        usage: Usage,
    ) -> str | None:
        """End it together with its files: `status`, or `cancelled` when that was asked for.

        None when the lease is lost; then nothing was written.
        """
        with writing(self._engine) as connection, Session(connection) as session:
            row = session.scalar(select(BatchRow).where(*_held(batch)).with_for_update())
            if row is None:
                return None
            for file in (output, errors):
                if file is not None:
                    session.merge(file_row(file))
            row.status = "cancelled" if row.status == "cancelling" else status
            row.output_file_id = output.id if output else None
            row.error_file_id = errors.id if errors else None
            row.completed, row.failed, row.ended_at = completed, failed, now
            row.input_tokens, row.cached_tokens = usage.input_tokens, usage.cached_tokens
            row.output_tokens, row.untold = usage.output_tokens, True
            row.lease_owner = row.lease_until = None
            session.flush()
            return row.status

    def release(self, batch: Batch, *, until: datetime) -> None:
        """Give it back; nobody takes it before `until`."""
        with writing(self._engine) as connection:
            connection.execute(
                update(BatchRow).where(*_held(batch)).values(lease_owner=None, lease_until=until)
            )

    def untold(self, *, limit: int) -> list[Batch]:
        """Batches that have ended and of which webhooks haven't heard."""
        with reading(self._engine) as connection, Session(connection) as session:
            wanted = select(BatchRow).where(BatchRow.untold.is_(True)).limit(limit)
            return [batch_of(row) for row in session.scalars(wanted)]

    def told(self, batch_id: str) -> None:
        with writing(self._engine) as connection:
            connection.execute(update(BatchRow).where(BatchRow.id == batch_id).values(untold=False))

    def unfinished(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that stand for batches which have not ended."""
        with reading(self._engine) as connection, Session(connection) as session:
            wanted = select(BatchRow.id).where(
                BatchRow.id.in_(ids), BatchRow.status.in_(UNFINISHED)
            )
            return set(session.scalars(wanted))

    def _step(self, batch: Batch, before: str, after: str, **values: Any) -> bool:
        with writing(self._engine) as connection, Session(connection) as session:
            row = session.scalar(select(BatchRow).where(*_held(batch)).with_for_update())
            if row is None:
                return False
            for name, value in values.items():
                setattr(row, name, value)
            if row.status == before:
                row.status = after
            session.flush()
            return True


def _unclaimed(now: datetime) -> tuple[Any, ...]:
    return (
        BatchRow.status.in_(UNFINISHED),
        or_(BatchRow.lease_until.is_(None), BatchRow.lease_until <= now),
    )


def _held(batch: Batch) -> tuple[Any, ...]:
    """Fenced: the claim of this epoch is the latest, and the batch has not ended."""
    return (
        BatchRow.id == batch.id,
        BatchRow.lease_epoch == batch.epoch,
        BatchRow.status.in_(UNFINISHED),
    )


def _free(session: Session, now: datetime) -> list[str]:
    driven = (
        select(BatchRow.tenant_id, func.count().label("driven"))
        .where(
            BatchRow.status.in_(UNFINISHED),
            BatchRow.lease_owner.is_not(None),
            BatchRow.lease_until > now,
        )
        .group_by(BatchRow.tenant_id)
        .subquery()
    )
    wanted = (
        select(BatchRow.id)
        .outerjoin(driven, driven.c.tenant_id == BatchRow.tenant_id)
        .where(*_unclaimed(now))
        .order_by(func.coalesce(driven.c.driven, 0), BatchRow.created_at, BatchRow.id)
        .limit(8)
    )
    return list(session.scalars(wanted))


def _owned(batch_id: str, tenant: str) -> Select[BatchRow]:
    return select(BatchRow).where(BatchRow.id == batch_id, BatchRow.tenant_id == tenant)


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount
