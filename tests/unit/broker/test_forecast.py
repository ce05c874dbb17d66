"""Drain rates, and what refused callers are told."""

from __future__ import annotations

from typing import Any

import pytest

from broker.drain import FADING_MS, Drain, drained
from broker.forecast import (
    Outlook,
    part_of_band,
    queue_wait_ms,
    tenant_wait_ms,
)
from broker.jobs import Band


def _steady(every_ms: int, count: int, tokens: int = 10, start: int = 1_000_000) -> Drain:
    """Jobs that all wait from `start` on and end one after the other."""
    drain: Drain | None = None
    for n in range(1, count + 1):
        drain = drained(drain, start + n * every_ms, start, tokens)
    assert drain is not None
    return drain


@pytest.mark.parametrize("count", [1, 5, 100, 5_000])
def test_a_steady_rate_is_measured_from_the_first_job_on(count: int) -> None:
    drain = _steady(200, count)
    assert drain.jobs_per_s == pytest.approx(5, rel=0.01)
    assert drain.tokens_per_s == pytest.approx(50, rel=0.01)


def test_a_rate_follows_a_change_within_some_minutes() -> None:
    drain = _steady(100, 1_000)
    for _ in range(180):
        drain = drained(drain, drain.at_ms + 1_000, 0, 10)
    assert drain.jobs_per_s == pytest.approx(1, rel=0.5)


def test_idle_time_does_not_count() -> None:
    drain = _steady(200, 100)
    hour = 3_600_000
    start = drain.at_ms + hour
    later = drained(drain, start + 200, start, 10)
    assert later.jobs_per_s == pytest.approx(5, rel=0.01)


def test_work_that_stands_still_lowers_the_rate() -> None:
    drain = _steady(200, 600)
    stuck = drain.seen(drain.at_ms + FADING_MS, 0)
    assert stuck.jobs_per_s is not None
    assert drain.jobs_per_s is not None
    assert stuck.jobs_per_s < drain.jobs_per_s / 1.5
    assert drain.seen(drain.at_ms - 5, 0) == drain


def test_a_drain_as_the_scripts_keep_it() -> None:
    assert Drain.unpack(None) is None
    drain = Drain(1.5, 20.0, 3000.25, 17)
    assert Drain.unpack(drain.pack()) == drain
    assert Drain(3, 30, 0.5, 17).jobs_per_s is None


def _outlook(**fields: Any) -> Outlook:
    queue = Drain(100, 10_000, 10_000, 0)  # 10 jobs/s, 1,000 tokens/s
    values: dict[str, Any] = {
        "now_ms": 0,
        "queue": queue,
        "tenant": None,
        "racing": (1, 0, 0),
        "parked": False,
        "part": 1.0,
        **fields,
    }
    return Outlook(**values)


def test_a_tenant_alone_gets_all() -> None:
    assert _outlook().jobs_per_s(Band.INTERACTIVE) == pytest.approx(10)


def test_shares_of_bands_and_tenants_and_the_size_of_jobs_count() -> None:
    large = Drain(10, 4_000, 10_000, 0)  # 400 tokens a job
    view = _outlook(racing=(3, 0, 2), part=0.25, tenant=large)
    assert view.jobs_per_s(Band.BATCH) == pytest.approx(1_000 * 0.05 / 0.80 * 0.25 / 400)
    assert view.jobs_per_s(Band.INTERACTIVE) == pytest.approx(1_000 * 0.75 / 0.80 * 0.25 / 400)


def test_a_tenant_at_its_cap_is_as_slow_as_it_was() -> None:
    own = Drain(10, 1_000, 10_000, 0)
    assert _outlook(tenant=own, parked=True).jobs_per_s(Band.INTERACTIVE) == pytest.approx(1)
    assert _outlook(tenant=own).jobs_per_s(Band.INTERACTIVE) == pytest.approx(10)


def test_nothing_measured_nothing_foretold() -> None:
    blank = _outlook(queue=None)
    assert blank.jobs_per_s(Band.BATCH) is None
    assert tenant_wait_ms(blank, Band.BATCH, 10_000) == 5_000
    assert queue_wait_ms(blank, 10, 10) == 5_000


def test_what_a_refused_tenant_is_told_to_wait() -> None:
    own = Drain(200, 20_000, 100_000, 0)  # 2 jobs/s
    # A sixteenth of its bound.
    assert tenant_wait_ms(_outlook(tenant=own, part=0.001), Band.BATCH, 320) == 10_000
    assert tenant_wait_ms(_outlook(tenant=own), Band.BATCH, 1) == 1_000
    assert tenant_wait_ms(_outlook(tenant=own, parked=True), Band.BATCH, 10**6) == 600_000


def test_what_a_shed_caller_is_told_to_wait() -> None:
    assert queue_wait_ms(_outlook(), waiting=1_600, mark=1_600) == 10_000
    assert queue_wait_ms(_outlook(), waiting=1_900, mark=1_600) == 40_000
    assert queue_wait_ms(_outlook(), waiting=1, mark=1) == 1_000


def test_a_tenants_part_of_its_band() -> None:
    assert part_of_band(1.0, [], 0, races=False) == 1
    assert part_of_band(2.0, [2.0], 1, races=True) == 1
    assert part_of_band(2.0, [1.0, 1.0], 2, races=False) == 0.5
    assert part_of_band(1.0, [1.0, 1.0], 8, races=True) == 0.125
    # Heavier than all that were read together: not more than everything.
    assert part_of_band(9.0, [1.0], 1, races=True) == 1
