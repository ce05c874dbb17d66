"""Rate limits: requests and tokens per minute by GCRA, and jobs at once.

The generic cell rate algorithm keeps one number per limit, the theoretical arrival time (TAT): the
moment at which all that was taken will have been paid off at the limit's pace. A minute's worth
may be taken at once. What has been paid off needs no cleaning up, so a crash leaks nothing; and as
the scripts are atomic, the limits hold exactly however many API processes there are.

Tokens are taken at submit as estimated, and put right when the job ends (a job that never ran
gives all of them back). A job larger than a minute's worth is let in when nothing is owed, and
what it takes beyond stays owed. Jobs at once are counted from the queues themselves for a tenant,
and by a set of ids for a key that has such a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

Scope = Literal["tenant", "key"]
Kind = Literal["requests", "tokens"]

MINUTE_MS = 60_000
#: A limit isn't held against a job for less than this: times are kept as floats.
TOLERANCE_MS = 0.5
#: The order in which the scripts tell of them.
METERS: tuple[tuple[Scope, Kind], ...] = (
    ("tenant", "requests"),
    ("tenant", "tokens"),
    ("key", "requests"),
    ("key", "tokens"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimits:
    """Bounds of a tenant or of one of its keys; 0 is without a bound."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    #: Jobs of all models that are accepted and not terminal. A key's are counted from the time it
    #: has this bound.
    max_jobs: int = 0


NO_LIMITS = RateLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitState:
    """A limit after a request, as response headers tell it."""

    scope: Scope
    kind: Kind
    #: Per minute.
    limit: int
    remaining: int
    #: Until nothing is taken any more.
    reset_ms: int


def advance(at: float | None, limit: int, units: int, now: int) -> tuple[float, float]:
    """The TAT after taking `units`, and how long it is too early for that (ms)."""
    step = MINUTE_MS / limit
    start = now if at is None else max(at, now)
    wait = start + min(units, limit) * step - now - MINUTE_MS
    return start + units * step, wait


def settled(at: float | None, limit: int, tokens: float, now: int) -> float:
    """The TAT after a correction: `tokens` is really taken minus taken at submit."""
    start = now if at is None else max(at, now)
    return max(now, start + tokens * MINUTE_MS / limit)


def state(scope: Scope, kind: Kind, limit: int, at: float | None, now: int) -> LimitState:
    level = 0.0 if at is None else max(at - now, 0.0)
    left = (MINUTE_MS - level) * limit / MINUTE_MS
    return LimitState(
        scope=scope,
        kind=kind,
        limit=limit,
        remaining=max(floor(left + 0.01), 0),
        reset_ms=ceil(level),
    )
