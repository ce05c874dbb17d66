"""Tenants and API keys as the rest of the API sees them, apart from how they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from broker.limits import NO_LIMITS, RateLimits
from broker.policies import TenantPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A customer of this installation. Times are in UTC."""

    #: `ten_…`; never used again.
    id: str
    #: Unique; for people and the command line.
    name: str
    policy: TenantPolicy
    created_at: datetime
    updated_at: datetime
    #: Since then none of its credentials work.
    disabled_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """What may be known of a key once it was shown. Times are in UTC."""

    #: `key_…`; not secret.
    id: str
    tenant_id: str
    tenant_name: str
    name: str
    #: First characters of the key, to recognise it by.
    prefix: str
    scopes: frozenset[str]
    #: Of this key alone, within those of its tenant.
    limits: RateLimits = NO_LIMITS
    created_at: datetime
    expires_at: datetime | None = None
    #: To the minute.
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def status(self, now: datetime) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A key just made, with the secret that is never shown again."""

    key: ApiKey
    secret: str = field(repr=False)
