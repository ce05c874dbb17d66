"""Who a request acts for, as its credential proves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from broker.limits import NO_LIMITS, RateLimits
from broker.policies import TenantPolicy

#: What a credential may be allowed to do; `jobs` is the default of a new key.
SCOPES: frozenset[str] = frozenset({"jobs", "admin"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """The tenant and key behind a request; everything a handler may know of the caller."""

    #: Id of the tenant (`ten_…`), the name its jobs go by in the broker.
    tenant: str
    tenant_name: str
    #: Id of the API key (`key_…`), or `client:<client_id>` of an access token.
    key_id: str
    #: Exactly what was granted; `admin` does not imply `jobs`.
    scopes: frozenset[str]
    policy: TenantPolicy = field(default_factory=TenantPolicy)
    #: Of the key alone, within those of the tenant's policy.
    key_limits: RateLimits = NO_LIMITS

    def has(self, scope: str) -> bool:
        return scope in self.scopes


@dataclass(frozen=True, kw_only=True, slots=True)
class Credential:
    """A live API key as the directory knows it."""

    principal: Principal
    #: Unix seconds; infinite when the key never expires.
    expires_at: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A live tenant as the directory knows it; access tokens name one."""

    id: str
    name: str
    policy: TenantPolicy


class Accounts(Protocol):
    """In-memory view of all live keys and tenants; no method waits for anything."""

    @property
    def ready(self) -> bool:
        """Whether accounts were loaded at least once."""
        ...

    def credential(self, digest: bytes) -> Credential | None:
        """The live key with this digest (see `api.auth.keys.digest`)."""
        ...

    def account(self, tenant_id: str) -> Account | None:
        """The live tenant with this id."""
        ...

    def used(self, key_id: str) -> None:
        """Note that a key was just used; written down later, coarsely."""
        ...
