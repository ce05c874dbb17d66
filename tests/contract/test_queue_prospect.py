"""When a waiting job is told to start, where the queue's state says more than its mean rate."""

from __future__ import annotations

import pytest

from broker.jobs import Band, Claim
from tests.contract.harness import MODEL, Harness, policy

#: How long a job runs (ms): long beside the milliseconds that the clock of a real server goes on.
JOB_MS = 5_000


def told(harness: Harness, job_id: str) -> float:
    """Wait that is foretold, in times of a job."""
    where = harness.queue.position(job_id)
    assert where is not None
    assert where.estimated_start_ms is not None
    return (where.estimated_start_ms - harness.now()) / JOB_MS


def run_some(harness: Harness, slots: int) -> list[str]:
    """Have as many jobs as there are slots done, side by side, of 100 tokens each."""
    claims: list[Claim] = harness.claim(slots)
    harness.advance(JOB_MS)
    for claim in claims:
        harness.finish(claim, tokens=100)
    return [claim.job.tenant for claim in claims]


def trickle_and_backlog(harness: Harness, *, of: str, band: Band) -> list[str]:
    """One slot; in turn a job of `of` comes and runs, and one of a backlog."""
    backlog = [harness.submit("hoarder", band=Band.BATCH) for _ in range(40)]
    for _ in range(15):
        harness.submit(of, band=band)
        assert run_some(harness, 1) == [of]
        assert run_some(harness, 1) == ["hoarder"]
    return backlog[15:]


def test_a_band_that_lives_on_what_comes_in_leaves_the_rest(harness: Harness) -> None:
    backlog = trickle_and_backlog(harness, of="i", band=Band.INTERACTIVE)
    # Nothing of it waits just now, and still half of the time is its.
    assert told(harness, backlog[10]) == pytest.approx(20.5, rel=0.15)
    # Nor is one that waits a backlog that would leave but a sixteenth.
    harness.submit("i", band=Band.INTERACTIVE)
    assert told(harness, backlog[10]) == pytest.approx(21.5, rel=0.15)
    assert told(harness, harness.submit("j", band=Band.INTERACTIVE)) < 2.0


def test_what_came_in_and_comes_no_more_is_forgotten(harness: Harness) -> None:
    backlog = trickle_and_backlog(harness, of="i", band=Band.INTERACTIVE)
    harness.queue.pause(MODEL)
    harness.advance(180_000)
    harness.queue.resume(MODEL)
    for _ in range(20):
        backlog.append(harness.submit("hoarder", band=Band.BATCH))
    for _ in range(20):
        assert run_some(harness, 1) == ["hoarder"]
    ratio = told(harness, backlog[40]) / told(harness, backlog[30])
    assert ratio == pytest.approx(2.0, rel=0.15)
    assert told(harness, harness.submit("i", band=Band.INTERACTIVE)) < 5.0


def test_tenants_that_keep_coming_go_on_coming(harness: Harness) -> None:
    for _ in range(15):
        harness.submit("steady")
        assert run_some(harness, 1) == ["steady"]
        harness.advance(JOB_MS)
    burst = [harness.submit("new") for _ in range(9)]
    assert told(harness, burst[8]) == pytest.approx(16.5, rel=0.15)
    # What the same tenant has put in before doesn't stand in its own way.
    mine = [harness.submit("steady") for _ in range(9)]
    for job_id in burst:
        harness.queue.cancel(job_id)
    assert told(harness, mine[8]) == pytest.approx(8.5, rel=0.15)


def test_a_rival_with_little_waiting_is_soon_through(harness: Harness) -> None:
    for _ in range(20):
        harness.submit("a")
    for _ in range(20):
        run_some(harness, 1)
    mine = [harness.submit("a") for _ in range(20)]
    harness.submit("b")
    harness.submit("b")
    assert told(harness, mine[19]) == pytest.approx(21.5, rel=0.15)
    assert told(harness, mine[1]) == pytest.approx(2.5, abs=1.1)
    # Three times the weight: eleven of its jobs, and as many as fit beside them of the others.
    harness.queue.set_policy("c", policy(weight=3.0))
    theirs = [harness.submit("c") for _ in range(12)]
    assert told(harness, theirs[11]) == pytest.approx(11 + 11 / 3 + 2 + 0.5, rel=0.15)
    assert told(harness, mine[19]) == pytest.approx(33.5, rel=0.15)


def test_who_is_ahead_of_the_others_waits_for_them(harness: Harness) -> None:
    for _ in range(20):
        harness.submit("a")
    for _ in range(20):
        run_some(harness, 1)
    harness.submit("a", cost=1_000)
    theirs = [harness.submit("a") for _ in range(10)]
    mine = [harness.submit("b") for _ in range(10)]
    assert run_some(harness, 1) == ["b"]
    assert harness.claim_one().job.cost == 1_000
    # It has begun what is worth ten jobs.
    assert told(harness, mine[9]) == pytest.approx(8.5, rel=0.15)
    assert told(harness, theirs[0]) == pytest.approx(9.5, rel=0.15)


def test_a_cap_counts_before_it_is_reached(harness: Harness) -> None:
    harness.queue.set_policy("capped", policy(max_in_flight=1))
    capped = [harness.submit("capped") for _ in range(20)]
    free = [harness.submit("free") for _ in range(60)]
    for _ in range(10):
        assert sorted(run_some(harness, 4)) == ["capped", "free", "free", "free"]
    # Nothing runs just now, so nobody is at a cap; it is one job at a time nevertheless.
    assert told(harness, capped[18]) == pytest.approx(8.0, abs=1.0)
    # And what it can't take is for the others.
    assert told(harness, free[54]) == pytest.approx(8.0, abs=1.0)
    harness.claim(4)
    assert told(harness, capped[19]) == pytest.approx(9.0, abs=1.0)
    assert told(harness, free[57]) == pytest.approx(8.0, abs=1.0)


def test_slots_that_were_idle_count(harness: Harness) -> None:
    for _ in range(8):
        harness.submit("a")
    run_some(harness, 4)
    run_some(harness, 4)
    for _ in range(20):
        harness.submit("a")
        run_some(harness, 4)
    jobs = [harness.submit("a") for _ in range(24)]
    # Of late one job was done at a time, as there were no more; four are before long.
    assert told(harness, jobs[23]) == pytest.approx(6.4, abs=1.0)
    harness.claim(4)
    assert told(harness, jobs[23]) == pytest.approx(5.3, abs=0.8)
    # A queue whose running jobs stand still promises less.
    harness.advance(240_000)
    assert told(harness, jobs[23]) > 10.0
