"""Tenants and API keys in the database: the only module that reads and writes their tables.

Every change counts the change counter up in its own transaction. The counter's row lock puts the
changes in line, so whoever reads counter n sees all changes up to the n-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.accounts import schema
from api.accounts.database import reading, writing
from api.accounts.errors import NameTakenError, SchemaError, UnknownAccountError
from api.accounts.records import ApiKey, Tenant
from api.accounts.tables import ApiKeyRow, ChangeRow, TenantRow
from broker.jobs import Band
from broker.limits import NO_LIMITS, RateLimits
from broker.policies import TenantPolicy

#: Rows of a long answer that are fetched at once.
_PIECE: Final = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """A live key as authentication needs it."""

    id: str
    tenant_id: str
    digest: bytes
    scopes: frozenset[str]
    limits: RateLimits
    expires_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """All live tenants and keys, at least as new as `counter` says."""

    counter: int
    tenants: tuple[Tenant, ...]
    keys: tuple[StoredKey, ...]


class AccountStore:
    """Blocking and thread-safe. Every call may raise `DatabaseUnavailableError`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def check_schema(self) -> None:
        """Raises `SchemaError` unless the database is at our revision."""
        schema.check(self._engine)

    # -- changes --------------------------------------------------------------------------------
    def add_tenant(self, tenant: Tenant) -> None:
        """Raises `NameTakenError`."""
        with self._changing() as session:
            if session.scalar(select(TenantRow.id).where(TenantRow.name == tenant.name)):
                raise NameTakenError(f"there is a tenant {tenant.name!r} already")
            row = TenantRow(id=tenant.id, name=tenant.name, created_at=tenant.created_at)
            _write_policy(row, tenant)
            session.add(row)

    def change_tenant(self, name_or_id: str, change: Callable[[Tenant], Tenant]) -> Tenant:
        """Write what `change` makes of the tenant, in one transaction.

        Raises `UnknownAccountError`.
        """
        with self._changing() as session:
            row = _find_tenant(session, name_or_id)
            changed = change(_tenant(row))
            _write_policy(row, changed)
            return changed

    def add_key(self, key: ApiKey, *, digest: bytes, pepper_version: int) -> None:
        with self._changing() as session:
            row = ApiKeyRow(
                id=key.id,
                tenant_id=key.tenant_id,
                name=key.name,
                prefix=key.prefix,
                digest=digest,
                pepper_version=pepper_version,
                scopes=" ".join(sorted(key.scopes)),
                created_at=key.created_at,
                expires_at=key.expires_at,
            )
            _write_limits(row, key.limits)
            session.add(row)

    def change_key(self, key_id: str, change: Callable[[RateLimits], RateLimits]) -> ApiKey:
        """Write what `change` makes of the key's limits; raises `UnknownAccountError`."""
        with self._changing() as session:
            row, tenant = _find_key(session, key_id)
            _write_limits(
                row, change(_limits(row.requests_per_minute, row.tokens_per_minute, row.max_jobs))
            )
            return _api_key(row, tenant.name)

    def revoke_key(self, key_id: str, *, at: datetime) -> ApiKey:
        """Revoke for good; a second time changes nothing. Raises `UnknownAccountError`."""
        with self._changing() as session:
            row, tenant = _find_key(session, key_id)
            row.revoked_at = row.revoked_at or at
            return _api_key(row, tenant.name)

    def note_use(self, last_used: Mapping[str, datetime], *, older_than: datetime) -> None:
        """Write `last_used_at` where it is older than `older_than`; not a change of the account."""
        with writing(self._engine) as connection:
            for key_id, used_at in sorted(last_used.items()):
                stale = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < older_than)
                connection.execute(
                    update(ApiKeyRow)
                    .where(ApiKeyRow.id == key_id, stale)
                    .values(last_used_at=used_at)
                )

    # -- readings -------------------------------------------------------------------------------
    def tenant(self, name_or_id: str) -> Tenant:
        """Raises `UnknownAccountError`."""
        with self._session() as session:
            return _tenant(_find_tenant(session, name_or_id))

    def tenants(self) -> list[Tenant]:
        """All, disabled ones too, by name."""
        with self._session() as session:
            rows = session.scalars(select(TenantRow).order_by(TenantRow.name))
            return [_tenant(row) for row in rows]

    def keys(self, tenant_id: str | None = None) -> list[ApiKey]:
        """Oldest first, revoked ones too."""
        wanted = select(ApiKeyRow, TenantRow.name).join(
            TenantRow, TenantRow.id == ApiKeyRow.tenant_id
        )
        if tenant_id is not None:
            wanted = wanted.where(ApiKeyRow.tenant_id == tenant_id)
        with self._session() as session:
            rows = session.execute(wanted.order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return [_api_key(row, name) for row, name in rows]

    def counter(self) -> int:
        """Changes so far."""
        with self._session() as session:
            return _counter(session)

    def load(self, *, now: datetime) -> Loaded:
        """All that can authenticate at `now` or later."""
        live = select(
            ApiKeyRow.id,
            ApiKeyRow.tenant_id,
            ApiKeyRow.digest,
            ApiKeyRow.scopes,
            ApiKeyRow.requests_per_minute,
            ApiKeyRow.tokens_per_minute,
            ApiKeyRow.max_jobs,
            ApiKeyRow.expires_at,
        ).where(
            ApiKeyRow.revoked_at.is_(None),
            or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now),
        )
        with self._session() as session:
            # The counter first: a change in between makes the rest newer than it says, and the
            # next look at the counter loads again.
            counter = _counter(session)
            tenants = session.scalars(select(TenantRow).where(TenantRow.disabled_at.is_(None)))
            return Loaded(
                counter=counter,
                tenants=tuple(_tenant(row) for row in tenants),
                keys=tuple(
                    StoredKey(
                        id=row.id,
                        tenant_id=row.tenant_id,
                        digest=row.digest,
                        scopes=frozenset(row.scopes.split()),
                        limits=_limits(
                            row.requests_per_minute, row.tokens_per_minute, row.max_jobs
                        ),
                        expires_at=row.expires_at,
                    )
                    # In pieces, so that the thread lets the event loop run in between.
                    for row in session.execute(live).yield_per(_PIECE)
                ),
            )

    # -- transactions ---------------------------------------------------------------------------
    @contextmanager
    def _session(self) -> Iterator[Session]:
        with reading(self._engine) as connection, Session(connection) as session:
            yield session

    @contextmanager
    def _changing(self) -> Iterator[Session]:
        """A transaction that changes accounts; the counter is taken first, as a lock."""
        try:
            with writing(self._engine) as connection, Session(connection) as session:
                session.execute(update(ChangeRow).values(counter=ChangeRow.counter + 1))
                yield session
                session.flush()
        except IntegrityError as error:
            cause = str(error.orig).split("\n", 1)[0]
            raise SchemaError(f"the accounts database refused the change: {cause}") from None


def _find_tenant(session: Session, name_or_id: str) -> TenantRow:
    named = or_(TenantRow.name == name_or_id, TenantRow.id == name_or_id)
    row = session.scalar(select(TenantRow).where(named))
    if row is None:
        raise UnknownAccountError(f"there is no tenant {name_or_id!r}")
    return row


def _find_key(session: Session, key_id: str) -> tuple[ApiKeyRow, TenantRow]:
    row = session.get(ApiKeyRow, key_id)
    if row is None:
        raise UnknownAccountError(f"there is no key {key_id!r}")
    return row, session.get_one(TenantRow, row.tenant_id)


def _counter(session: Session) -> int:
    counter: int | None = session.scalar(select(ChangeRow.counter))
    if counter is None:
        raise SchemaError("the accounts database has lost its change counter")
    return counter


def _write_policy(row: TenantRow, tenant: Tenant) -> None:
    row.weight = tenant.policy.weight
    row.max_in_flight = tenant.policy.max_in_flight
    row.max_queued = tenant.policy.max_queued
    row.requests_per_minute = tenant.policy.requests_per_minute
    row.tokens_per_minute = tenant.policy.tokens_per_minute
    row.max_jobs = tenant.policy.max_jobs
    row.default_priority = tenant.policy.default_band.value
    row.allow_logprobs = tenant.policy.allow_logprobs
    row.updated_at = tenant.updated_at
    row.disabled_at = tenant.disabled_at


def _tenant(row: TenantRow) -> Tenant:
    return Tenant(
        id=row.id,
        name=row.name,
        policy=TenantPolicy(
            weight=row.weight,
            max_in_flight=row.max_in_flight,
            max_queued=row.max_queued,
            requests_per_minute=row.requests_per_minute,
            tokens_per_minute=row.tokens_per_minute,
            max_jobs=row.max_jobs,
            default_band=Band(row.default_priority),
            allow_logprobs=row.allow_logprobs,
        ),
        created_at=row.created_at,
        updated_at=row.updated_at,
        disabled_at=row.disabled_at,
    )


def _limits(requests_per_minute: int, tokens_per_minute: int, max_jobs: int) -> RateLimits:
    """Of a key; most have none and share one object."""
    if not (requests_per_minute or tokens_per_minute or max_jobs):
        return NO_LIMITS
    return RateLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_jobs=max_jobs,
    )


def _write_limits(row: ApiKeyRow, limits: RateLimits) -> None:
    row.requests_per_minute = limits.requests_per_minute
    row.tokens_per_minute = limits.tokens_per_minute
    row.max_jobs = limits.max_jobs


def _api_key(row: ApiKeyRow, tenant_name: str) -> ApiKey:
    return ApiKey(
        id=row.id,
        tenant_id=row.tenant_id,
        tenant_name=tenant_name,
        name=row.name,
        prefix=row.prefix,
        scopes=frozenset(row.scopes.split()),
        limits=_limits(row.requests_per_minute, row.tokens_per_minute, row.max_jobs),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
