"""Too many jobs: who is refused, how long it is told to wait, and where a waiting job stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from broker.errors import JobNotFoundError, OverloadedError, QueueFullError
from broker.jobs import BANDS, Band
from tests.contract.harness import MODEL, Harness, policy

Make = Callable[..., Harness]


def _work(harness: Harness, tenant: str, jobs: int, every_ms: int, tokens: int = 100) -> None:
    """Have jobs of a tenant done, one after the other, that all came at once."""
    for _ in range(jobs):
        harness.submit(tenant)
    for _ in range(jobs):
        claim = harness.claim_one()
        assert claim.job.tenant == tenant
        harness.advance(every_ms)
        harness.finish(claim, tokens=tokens)


# -- refusals -------------------------------------------------------------------------------------
def test_a_refused_tenant_is_told_when_there_will_be_room(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=4_000)
    harness.queue.set_policy("a", policy(max_queued=2))
    harness.submit("a")
    harness.submit("a")
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert not isinstance(full.value, OverloadedError)
    assert (full.value.scope, full.value.limit) == ("tenant", 2)
    # One job in four seconds.
    assert full.value.retry_after_ms == pytest.approx(4_000, rel=0.1)


def test_a_tenant_unknown_so_far_is_measured_by_the_queue(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=4_000)
    harness.queue.set_policy("b", policy(max_queued=1))
    harness.submit("a")
    harness.submit("b")
    with pytest.raises(QueueFullError) as full:
        harness.submit("b")
    # It shares with one other.
    assert full.value.retry_after_ms == pytest.approx(8_000, rel=0.1)


def test_where_nothing_was_done_yet_the_wait_is_a_guess(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_queued=1))
    harness.submit("a")
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert full.value.retry_after_ms == 5_000


def test_a_queue_that_stands_still_asks_for_more_patience(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=4_000)
    harness.queue.set_policy("a", policy(max_queued=1))
    harness.submit("a")
    harness.advance(1_800_000)
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert full.value.retry_after_ms == 600_000


def test_an_idle_hour_does_not_make_a_queue_look_slow(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=4_000)
    harness.advance(3_000_000)
    harness.queue.set_policy("a", policy(max_queued=1))
    harness.submit("a")
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert full.value.retry_after_ms == pytest.approx(4_000, rel=0.1)


def test_a_full_model_sheds_the_least_urgent_first(make_harness: Make) -> None:
    harness = make_harness(
        max_queued_total=8, shed_batch_at=0.25, shed_standard_at=0.5, shed_interactive_at=0.75
    )
    refusals: list[OverloadedError] = []
    for waiting in range(7):
        for band in reversed(BANDS):
            try:
                harness.queue.cancel(harness.submit("a", band=band))
            except OverloadedError as error:
                refusals.append(error)
        if waiting < 6:
            harness.submit("b")
    assert Counter(each.band for each in refusals) == {
        Band.BATCH: 5,
        Band.STANDARD: 3,
        Band.INTERACTIVE: 1,
    }
    assert {(each.band, each.limit) for each in refusals} == {
        (Band.BATCH, 2),
        (Band.STANDARD, 4),
        (Band.INTERACTIVE, 6),
    }
    assert {(each.scope, each.retry_after_ms) for each in refusals} == {("model", 5_000)}
    harness.claim(9)
    harness.submit("a", band=Band.BATCH)


def test_shedding_tells_when_the_queue_will_be_below_its_mark(make_harness: Make) -> None:
    harness = make_harness(max_queued_total=20, default_max_queued=100)
    _work(harness, "a", 15, every_ms=2_000)
    for _ in range(20):
        harness.submit("b")
    with pytest.raises(OverloadedError) as shed:
        harness.submit("a", band=Band.BATCH)
    # Four above the mark of 16, and one more to have room; one in two seconds.
    assert (shed.value.limit, shed.value.scope) == (16, "model")
    assert shed.value.retry_after_ms == pytest.approx(10_000, rel=0.1)


# -- position -------------------------------------------------------------------------------------
def test_the_position_of_a_waiting_job(harness: Harness) -> None:
    ids = [harness.submit("a") for _ in range(3)]
    lower = harness.submit("a", band=Band.BATCH)
    other = harness.submit("b")
    for job_id, place in [*zip(ids, range(3), strict=True), (lower, 0), (other, 0)]:
        where = harness.queue.position(job_id)
        assert where is not None
        assert (where.position, where.exact, where.estimated_start_ms) == (place, True, None)
    harness.claim(1)
    where = harness.queue.position(ids[2], tenant="a")
    assert where is not None
    assert where.position == 1


def test_a_job_that_does_not_wait_has_no_position(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    assert harness.queue.position(job_id) is None
    harness.finish(claim)
    assert harness.queue.position(job_id) is None


def test_the_position_of_anothers_job_is_not_told(harness: Harness) -> None:
    job_id = harness.submit("a")
    for unknown, tenant in ((job_id, "b"), ("job_none", None)):
        with pytest.raises(JobNotFoundError):
            harness.queue.position(unknown, tenant=tenant)


def test_when_a_job_may_start(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=2_000)
    ids = [harness.submit("a") for _ in range(10)]
    where = harness.queue.position(ids[9])
    assert where is not None
    assert where.estimated_start_ms is not None
    assert where.estimated_start_ms - harness.now() == pytest.approx(19_000, rel=0.1)
    for _ in range(10):
        harness.submit("b")
    where = harness.queue.position(ids[9])
    assert where is not None
    assert where.estimated_start_ms is not None
    assert where.estimated_start_ms - harness.now() == pytest.approx(38_000, rel=0.1)


def test_when_a_delayed_job_may_start(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=2_000)
    job_id = harness.submit("a", delay_ms=60_000)
    where = harness.queue.position(job_id)
    assert where is not None
    assert (where.position, where.exact) == (0, True)
    assert where.estimated_start_ms is not None
    assert where.estimated_start_ms - harness.now() == pytest.approx(61_000, rel=0.1)


def test_far_behind_a_position_is_about_right(harness: Harness) -> None:
    ids = []
    for n in range(1_200):
        ids.append(harness.submit("a"))
        if n % 3 == 0:
            harness.submit("b")
    where = harness.queue.position(ids[1_100])
    assert where is not None
    assert not where.exact
    # Jobs of the same millisecond stand in any order.
    assert where.position == pytest.approx(1_100, abs=50)
    where = harness.queue.position(ids[999])
    assert where is not None
    assert (where.position, where.exact) == (999, True)


def test_the_sweep_looks_at_rates_and_keeps_fresh_ones(harness: Harness) -> None:
    _work(harness, "a", 20, every_ms=4_000)
    harness.queue.sweep(MODEL)
    harness.queue.set_policy("a", policy(max_queued=1))
    harness.submit("a")
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert full.value.retry_after_ms == pytest.approx(4_000, rel=0.1)
