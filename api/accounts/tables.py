"""The tables of the accounts. Their schema in the database is made by the migrations alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, also on SQLite, which has no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        stored: datetime = value
        # SQLite gives back the UTC wall time it was given, without its zone.
        return stored.replace(tzinfo=UTC) if stored.tzinfo is None else stored.astimezone(UTC)


class Base(DeclarativeBase):
    #: Fixed names, so that migrations can name what they change on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime}  # noqa: RUF012


class TenantRow(Base):
    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint("weight > 0 AND weight <= 1000", name="weight"),
        CheckConstraint("max_in_flight >= 1", name="max_in_flight"),
        CheckConstraint("max_queued >= 1", name="max_queued"),
        CheckConstraint(
            "default_priority IN ('interactive', 'standard', 'batch')", name="default_priority"
        ),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    weight: Mapped[float]
    max_in_flight: Mapped[int]
    max_queued: Mapped[int]
    #: 0 is without a bound, here and for keys.
    requests_per_minute: Mapped[int] = mapped_column(server_default="0")
    tokens_per_minute: Mapped[int] = mapped_column(server_default="0")
    max_jobs: Mapped[int] = mapped_column(server_default="0")
    default_priority: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]


class ApiKeyRow(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    prefix: Mapped[str] = mapped_column(String(32))
    #: HMAC-SHA256(pepper, key); the key itself is stored nowhere.
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    pepper_version: Mapped[int]
    #: Separated by one space.
    scopes: Mapped[str] = mapped_column(String(255))
    requests_per_minute: Mapped[int] = mapped_column(server_default="0")
    tokens_per_minute: Mapped[int] = mapped_column(server_default="0")
    max_jobs: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class ChangeRow(Base):
    """One row that counts changes, so that a process can see cheaply that it missed one."""

    __tablename__ = "account_changes"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    counter: Mapped[int]
