"""The arithmetic of rate limits."""

from __future__ import annotations

import pytest

from broker.limits import MINUTE_MS, TOLERANCE_MS, LimitState, advance, settled, state
from broker.policies import TenantPolicy

NOW = 1_700_000_000_000


def _take(limit: int, units: int, times: int, at: float | None = None) -> tuple[int, float | None]:
    """How many of `times` requests of `units` get in at once, and the TAT afterwards."""
    taken = 0
    for _ in range(times):
        to, wait = advance(at, limit, units, NOW)
        if wait <= TOLERANCE_MS:
            at, taken = to, taken + 1
    return taken, at


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 599, 10_000])
def test_exactly_a_minutes_worth_gets_in_at_once(limit: int) -> None:
    taken, at = _take(limit, 1, limit + 5)
    assert taken == limit
    assert at == pytest.approx(NOW + MINUTE_MS, abs=1)


def test_what_is_paid_off_may_be_taken_again() -> None:
    _, at = _take(60, 1, 60)
    for later, allowed in ((900, False), (1_000, True), (1_500, True)):
        assert (advance(at, 60, 1, NOW + later)[1] <= TOLERANCE_MS) == allowed
    assert advance(at, 60, 1, NOW)[1] == pytest.approx(1_000)
    assert advance(at, 60, 30, NOW)[1] == pytest.approx(30_000)


def test_idle_time_saves_up_no_more_than_a_minutes_worth() -> None:
    assert _take(6, 1, 20, at=NOW - 3_600_000.0)[0] == 6


def test_more_than_a_minutes_worth_gets_in_alone_and_stays_owed() -> None:
    to, wait = advance(None, 100, 250, NOW)
    assert wait <= TOLERANCE_MS
    assert to == NOW + 2.5 * MINUTE_MS
    assert advance(to, 100, 1, NOW)[1] == pytest.approx(1.5 * MINUTE_MS + 600)
    assert advance(NOW + 600.0, 100, 250, NOW)[1] == pytest.approx(600)


def test_settling_gives_back_and_takes_more() -> None:
    at, _ = advance(None, 600, 300, NOW)
    assert settled(at, 600, -200, NOW) == pytest.approx(NOW + 10_000)
    assert settled(at, 600, 100, NOW) == pytest.approx(NOW + 40_000)
    assert settled(at, 600, -200, NOW + 25_000) == NOW + 25_000, "never into the past"
    assert settled(None, 600, 100, NOW) == NOW + 10_000


def test_a_limit_as_headers_tell_it() -> None:
    at, _ = advance(None, 5, 1, NOW)
    assert state("tenant", "requests", 5, at, NOW) == LimitState(
        scope="tenant", kind="requests", limit=5, remaining=4, reset_ms=12_000
    )
    assert state("key", "tokens", 5, None, NOW).remaining == 5
    owed = state("key", "tokens", 5, NOW + 90_000.0, NOW)
    assert (owed.remaining, owed.reset_ms) == (0, 90_000)
    assert state("key", "tokens", 5, NOW - 1.0, NOW).reset_ms == 0


def test_a_policys_limits() -> None:
    policy = TenantPolicy(requests_per_minute=1, tokens_per_minute=2, max_jobs=3)
    limits = policy.limits
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.max_jobs) == (1, 2, 3)
    assert TenantPolicy().limits.max_jobs == 0
