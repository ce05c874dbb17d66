"""Which policies and limits may be given to tenants and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, TypedDict, Unpack

from api.accounts.errors import InvalidAccountError
from broker.jobs import Band
from broker.limits import RateLimits
from broker.policies import TenantPolicy

_MAX_WEIGHT: Final = 1000.0
#: Fits every database's INTEGER and every double of Lua.
_MAX_BOUND: Final = 1_000_000_000


#: Bounds that 0 takes away.
_MAY_BE_NONE: Final = frozenset({"requests_per_minute", "tokens_per_minute", "max_jobs"})


class LimitChanges(TypedDict, total=False):
    """Limits of a tenant or a key. What is absent or None stays as it is; 0 takes one away."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None


class PolicyChanges(LimitChanges, total=False):
    """Fields of a `TenantPolicy`, by its names."""

    weight: float | None
    max_in_flight: int | None
    max_queued: int | None
    default_band: Band | None
    allow_logprobs: bool | None


def changed_policy(base: TenantPolicy, **changes: Unpack[PolicyChanges]) -> TenantPolicy:
    """The policy with what is given. Raises `InvalidAccountError`."""
    given: dict[str, Any] = {what: value for what, value in changes.items() if value is not None}
    for what, value in given.items():
        if what == "weight":
            if not 0 < value <= _MAX_WEIGHT:
                raise InvalidAccountError(f"a weight is more than 0 and up to {_MAX_WEIGHT:g}")
            given[what] = float(value)
        elif what not in ("default_band", "allow_logprobs"):
            _bound(what, value, least=0 if what in _MAY_BE_NONE else 1)
    return replace(base, **given)


def changed_limits(base: RateLimits, **changes: Unpack[LimitChanges]) -> RateLimits:
    """A key's limits with what is given. Raises `InvalidAccountError`."""
    given: dict[str, Any] = {what: value for what, value in changes.items() if value is not None}
    return replace(base, **{what: _bound(what, value) for what, value in given.items()})


def _bound(what: str, value: int, *, least: int = 0) -> int:
    if not least <= value <= _MAX_BOUND:
        raise InvalidAccountError(f"{what} is a whole number from {least} to {_MAX_BOUND}")
    return value
