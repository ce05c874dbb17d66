"""Which policies and limits may be given to tenants and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from api.accounts.errors import InvalidAccountError
from broker.jobs import Band
from broker.limits import RateLimits
from broker.policies import TenantPolicy

_MAX_WEIGHT: Final = 1000.0
#: Fits every database's INTEGER and every double of Lua.
_MAX_BOUND: Final = 1_000_000_000


def changed_policy(
    base: TenantPolicy,
    *,
    weight: float | None = None,
    max_in_flight: int | None = None,
    max_queued: int | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_jobs: int | None = None,
    default_band: Band | None = None,
) -> TenantPolicy:
    """The policy with what is given; of the last three bounds 0 takes one away.

    Raises `InvalidAccountError`.
    """
    if weight is not None:
        if not 0 < weight <= _MAX_WEIGHT:
            raise InvalidAccountError(f"a weight is more than 0 and up to {_MAX_WEIGHT:g}")
        base = replace(base, weight=float(weight))
    if max_in_flight is not None:
        base = replace(base, max_in_flight=_bound("max_in_flight", max_in_flight, least=1))
    if max_queued is not None:
        base = replace(base, max_queued=_bound("max_queued", max_queued, least=1))
    if requests_per_minute is not None:
        requests = _bound("requests_per_minute", requests_per_minute)
        base = replace(base, requests_per_minute=requests)
    if tokens_per_minute is not None:
        base = replace(base, tokens_per_minute=_bound("tokens_per_minute", tokens_per_minute))
    if max_jobs is not None:
        base = replace(base, max_jobs=_bound("max_jobs", max_jobs))
    return base if default_band is None else replace(base, default_band=default_band)


def changed_limits(
    base: RateLimits,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_jobs: int | None = None,
) -> RateLimits:
    """A key's limits with what is given; 0 takes one away. Raises `InvalidAccountError`."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_jobs": max_jobs,
    }
    return replace(
        base, **{what: _bound(what, value) for what, value in given.items() if value is not None}
    )


def _bound(what: str, value: int, *, least: int = 0) -> int:
    if not least <= value <= _MAX_BOUND:
        raise InvalidAccountError(f"{what} is a whole number from {least} to {_MAX_BOUND}")
    return value
