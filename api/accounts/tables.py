"""The tables of the accounts. Their schema in the database is made by the migrations alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    false,
    text,
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
    allow_logprobs: Mapped[bool] = mapped_column(server_default=text("false"))
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


class FileRow(Base):
    """What is known of a stored file; its bytes are in the file store, by the same id."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_tenant_id_created_at", "tenant_id", "created_at", "id"),
        Index("ix_files_expires_at", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str] = mapped_column(String(255))
    #: `batch`, `batch_output` or `user_data`.
    purpose: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]


class BatchRow(Base):
    """A batch, and which process drives it. Its results are files."""

    __tablename__ = "batches"
    __table_args__ = (
        CheckConstraint(
            "status IN ('validating', 'in_progress', 'finalizing', 'completed', 'failed',"
            " 'expired', 'cancelling', 'cancelled')",
            name="status",
        ),
        Index("ix_batches_tenant_id_created_at", "tenant_id", "created_at", "id"),
        Index("ix_batches_status", "status"),
        Index("ix_batches_untold", "untold"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(64))
    #: Not a reference: a batch outlives its files.
    input_file_id: Mapped[str] = mapped_column(String(40))
    output_file_id: Mapped[str | None] = mapped_column(String(40))
    error_file_id: Mapped[str | None] = mapped_column(String(40))
    #: The caller's own, as JSON.
    batch_metadata: Mapped[str] = mapped_column("metadata", Text)
    status: Mapped[str] = mapped_column(String(16))
    #: Why it failed: a JSON list of problems.
    errors: Mapped[str | None] = mapped_column(Text)
    #: Jobs it may have in the queues at once.
    window: Mapped[int] = mapped_column("job_window")
    #: How long its output files are kept; null: until they are deleted.
    output_ttl_s: Mapped[int | None]
    total: Mapped[int] = mapped_column(server_default="0")
    completed: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    #: The one that all its lines name; null: several, or not known yet.
    model: Mapped[str | None] = mapped_column(String(255))
    #: Of all its lines, once it has ended.
    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    #: It has ended, and webhooks haven't been told.
    untold: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    #: When it became completed, failed, expired or cancelled.
    ended_at: Mapped[datetime | None]
    #: The process that drives it, until when nobody else may, and a number that grows with each
    #: claim and fences what an earlier one still does.
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[datetime | None]
    lease_epoch: Mapped[int] = mapped_column(server_default="0")


class WebhookEndpointRow(Base):
    """Secrets aren't here: they are derived from id and version (broker/webhooks/signing.py)."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    url: Mapped[str] = mapped_column(String(2048))
    #: Separated by one space.
    event_types: Mapped[str] = mapped_column(String(1000))
    include_output: Mapped[bool]
    enabled: Mapped[bool]
    secret_version: Mapped[int]
    #: Until then the secret before signs as well.
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class WebhookSecretRow(Base):
    """The secret of a tenant's webhooks of single jobs, once it was shown."""

    __tablename__ = "webhook_secrets"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    secret_version: Mapped[int]
    previous_until: Mapped[datetime | None]
