"""Webhook endpoints in the database: the only module that reads and writes their tables.

Every call is about one tenant, apart from `published`, which is for the copy in Redis.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.accounts.database import reading, writing
from api.accounts.errors import AccountsError, SchemaError, UnknownAccountError
from api.accounts.tables import TenantRow, WebhookEndpointRow, WebhookSecretRow
from broker.webhooks.endpoints import Endpoint, Signing

_ID_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


class TooManyEndpointsError(AccountsError):
    """The tenant has as many endpoints as it may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEndpoint:
    """An endpoint with what only its owner sees of it. Times are in UTC."""

    endpoint: Endpoint
    name: str
    created_at: datetime
    updated_at: datetime

    @property
    def id(self) -> str:
        return self.endpoint.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """All that the webhook worker has to know, as it belongs into Redis."""

    #: Tenant → endpoint id → JSON.
    endpoints: Mapping[str, Mapping[str, bytes]]
    #: Tenant → JSON.
    signings: Mapping[str, bytes]


class WebhookEndpointStore:
    """Blocking and thread-safe. Every call may raise `DatabaseUnavailableError`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, tenant: str, *, most: int, **fields: Any) -> StoredEndpoint:
        """Raises `TooManyEndpointsError`. `fields`: as in `Endpoint`, and `name`."""
        now = datetime.now(UTC)
        with self._writing() as session:
            # The tenant's row puts its changes in line, so that the bound holds.
            _lock(session, tenant)
            mine = WebhookEndpointRow.tenant_id == tenant
            if (session.scalar(select(func.count()).where(mine)) or 0) >= most:
                raise TooManyEndpointsError(f"there are {most} endpoints already")
            row = WebhookEndpointRow(
                id="wep_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(20)),
                tenant_id=tenant,
                enabled=True,
                secret_version=1,
                created_at=now,
            )
            _write(row, fields, now)
            session.add(row)
            session.flush()
            return _stored(row)

    def change(self, tenant: str, endpoint_id: str, **fields: Any) -> StoredEndpoint:
        """Raises `UnknownAccountError`."""
        with self._writing() as session:
            row = _find(session, tenant, endpoint_id, lock=True)
            _write(row, fields, datetime.now(UTC))
            session.flush()
            return _stored(row)

    def rotate(self, tenant: str, endpoint_id: str, *, overlap_s: float) -> StoredEndpoint:
        """A new secret; the one before signs too for `overlap_s`. Raises `UnknownAccountError`."""
        now = datetime.now(UTC)
        with self._writing() as session:
            row = _find(session, tenant, endpoint_id, lock=True)
            row.secret_version += 1
            row.previous_until = now + timedelta(seconds=overlap_s)
            row.updated_at = now
            session.flush()
            return _stored(row)

    def rotate_jobs(self, tenant: str, *, overlap_s: float) -> Signing:
        """The same for the webhooks of a tenant's single jobs; the first call makes the first."""
        with self._writing() as session:
            _lock(session, tenant)
            row = session.get(WebhookSecretRow, tenant)
            if row is None:
                row = WebhookSecretRow(tenant_id=tenant, secret_version=1)
                session.add(row)
            else:
                row.secret_version += 1
                row.previous_until = datetime.now(UTC) + timedelta(seconds=overlap_s)
            session.flush()
            return _signing(row)

    def delete(self, tenant: str, endpoint_id: str) -> None:
        """Raises `UnknownAccountError`."""
        with self._writing() as session:
            session.delete(_find(session, tenant, endpoint_id, lock=True))

    def get(self, tenant: str, endpoint_id: str) -> StoredEndpoint:
        """Raises `UnknownAccountError`."""
        with self._reading() as session:
            return _stored(_find(session, tenant, endpoint_id))

    def list_all(self, tenant: str) -> list[StoredEndpoint]:
        """Newest first."""
        wanted = select(WebhookEndpointRow).where(WebhookEndpointRow.tenant_id == tenant)
        latest = WebhookEndpointRow.created_at.desc(), WebhookEndpointRow.id.desc()
        with self._reading() as session:
            return [_stored(row) for row in session.scalars(wanted.order_by(*latest))]

    def published(self, tenant: str | None = None) -> Published:
        """Of one tenant, or of all."""
        endpoints, signings = select(WebhookEndpointRow), select(WebhookSecretRow)
        if tenant is not None:
            endpoints = endpoints.where(WebhookEndpointRow.tenant_id == tenant)
            signings = signings.where(WebhookSecretRow.tenant_id == tenant)
        found: dict[str, dict[str, bytes]] = {}
        with self._reading() as session:
            for row in session.scalars(endpoints):
                mine = found.setdefault(row.tenant_id, {})
                mine[row.id] = _stored(row).endpoint.to_json()
            keys = {row.tenant_id: _signing(row).to_json() for row in session.scalars(signings)}
        return Published(endpoints=found, signings=keys)

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with reading(self._engine) as connection, Session(connection) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        try:
            with writing(self._engine) as connection, Session(connection) as session:
                yield session
                session.flush()
        except IntegrityError as error:
            cause = str(error.orig).split("\n", 1)[0]
            raise SchemaError(f"the accounts database refused the change: {cause}") from None


def _lock(session: Session, tenant: str) -> None:
    session.scalar(select(TenantRow.id).where(TenantRow.id == tenant).with_for_update())


def _find(
    session: Session, tenant: str, endpoint_id: str, *, lock: bool = False
) -> WebhookEndpointRow:
    wanted = select(WebhookEndpointRow).where(
        WebhookEndpointRow.id == endpoint_id, WebhookEndpointRow.tenant_id == tenant
    )
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None:
        raise UnknownAccountError(f"there is no webhook endpoint {endpoint_id!r}")
    return row


def _write(row: WebhookEndpointRow, fields: Mapping[str, Any], now: datetime) -> None:
    for name, value in fields.items():
        setattr(row, name, " ".join(value) if name == "event_types" else value)
    row.updated_at = now


def _stored(row: WebhookEndpointRow) -> StoredEndpoint:
    return StoredEndpoint(
        endpoint=Endpoint(
            id=row.id,
            url=row.url,
            event_types=tuple(row.event_types.split()),
            include_output=row.include_output,
            enabled=row.enabled,
            signing=_signing(row),
        ),
        name=row.name,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _signing(row: WebhookEndpointRow | WebhookSecretRow) -> Signing:
    until = row.previous_until
    return Signing(
        version=row.secret_version,
        previous_until_ms=int(until.timestamp() * 1000) if until is not None else 0,
    )
