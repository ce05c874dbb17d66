"""A batch as the rest of the house knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from api.accounts.tables import BatchRow
from broker.jobs import Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Times are in UTC."""

    #: `batch_…`.
    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    status: str = "validating"
    #: Why it failed: `code`, `line`, `message`, `param` each.
    errors: list[dict[str, Any]] = field(default_factory=list)
    window: int
    output_ttl_s: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    #: The one that all its lines name, if there is one.
    model: str | None = None
    #: Of all its lines, once it has ended.
    usage: Usage = field(default_factory=Usage)
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    cancelling_at: datetime | None = None
    ended_at: datetime | None = None
    epoch: int = 0


def batch_of(row: BatchRow) -> Batch:
    """From its row."""
    return Batch(
        id=row.id,
        tenant=row.tenant_id,
        key_id=row.key_id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        metadata=orjson.loads(row.batch_metadata),
        status=row.status,
        errors=orjson.loads(row.errors) if row.errors else [],
        window=row.window,
        output_ttl_s=row.output_ttl_s,
        total=row.total,
        completed=row.completed,
        failed=row.failed,
        model=row.model,
        usage=Usage(
            input_tokens=row.input_tokens,
            cached_tokens=row.cached_tokens,
            output_tokens=row.output_tokens,
        ),
        created_at=row.created_at,
        expires_at=row.expires_at,
        in_progress_at=row.in_progress_at,
        finalizing_at=row.finalizing_at,
        cancelling_at=row.cancelling_at,
        ended_at=row.ended_at,
        epoch=row.lease_epoch,
    )
