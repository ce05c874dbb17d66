"""Rate limits of the in-memory queue."""

from __future__ import annotations

from broker.limits import (
    METERS,
    TOLERANCE_MS,
    Kind,
    LimitState,
    RateLimits,
    Scope,
    advance,
    settled,
    state,
)

Owner = tuple[Scope, Kind, str]


class Meters:
    """Theoretical arrival times, by tenant and API key."""

    def __init__(self) -> None:
        self.times: dict[Owner, float] = {}

    def weigh(
        self, limits: list[tuple[Owner, int]], cost: int, now: int
    ) -> tuple[Owner, int, float] | None:
        """The limit that takes longest to let a job in, with its bound and the wait; or None."""
        refused, longest = None, TOLERANCE_MS
        for owner, limit in limits:
            wait = advance(self.times.get(owner), limit, _units(owner, cost), now)[1]
            if wait > longest:
                refused, longest = (owner, limit, wait), wait
        return refused

    def take(self, limits: list[tuple[Owner, int]], cost: int, now: int) -> None:
        for owner, limit in limits:
            self.times[owner] = advance(self.times.get(owner), limit, _units(owner, cost), now)[0]

    def settle(self, limits: list[tuple[Owner, int]], tokens: int, now: int) -> None:
        for owner, limit in limits:
            if owner[1] == "tokens" and tokens:
                self.times[owner] = settled(self.times.get(owner), limit, tokens, now)

    def states(self, limits: list[tuple[Owner, int]], now: int) -> tuple[LimitState, ...]:
        return tuple(
            state(owner[0], owner[1], limit, self.times.get(owner), now) for owner, limit in limits
        )


def limits_of(
    tenant: str, limits: RateLimits, key_id: str, key_limits: RateLimits
) -> list[tuple[Owner, int]]:
    """The rates a job is under, in the order of `METERS`."""
    bounds = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        key_limits.requests_per_minute,
        key_limits.tokens_per_minute,
    )
    names = {"tenant": tenant, "key": key_id}
    return [
        ((scope, kind, names[scope]), bound)
        for (scope, kind), bound in zip(METERS, bounds, strict=True)
        if bound
    ]


def _units(owner: Owner, cost: int) -> int:
    return 1 if owner[1] == "requests" else cost
