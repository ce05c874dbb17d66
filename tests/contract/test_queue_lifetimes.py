"""Deadlines: what isn't started in time expires, wherever it waits."""

from __future__ import annotations

import pytest

from broker.jobs import Event, EventType, JobError, Status
from tests.contract.harness import LEASE_MS, MODEL, Harness, policy


def test_a_claim_brings_the_times_the_job_was_given(harness: Harness) -> None:
    deadline = harness.now() + 60_000
    harness.submit(deadline_ms=deadline, execution_timeout_ms=2_500)
    job = harness.claim_one().job
    assert (job.deadline_ms, job.execution_timeout_ms) == (deadline, 2_500)
    harness.submit()
    job = harness.claim_one().job
    assert (job.deadline_ms, job.execution_timeout_ms) == (0, 0)


@pytest.mark.parametrize("way", ["claim", "sweep"])
def test_a_job_not_started_by_its_deadline_expires_without_a_lease(
    harness: Harness, way: str
) -> None:
    late = harness.submit(deadline_ms=harness.now() + 2_000)
    other = harness.submit()
    harness.advance(3_000)
    if way == "sweep":
        harness.queue.sweep(MODEL)
        assert harness.status(late) is Status.EXPIRED
    assert [claim.job.id for claim in harness.claim(9)] == [other]
    job = harness.queue.get(late)
    assert (job.status, job.attempt, job.started_ms) == (Status.EXPIRED, 0, 0)
    assert job.finished_ms > 0
    assert job.error == JobError(
        code="deadline_exceeded", message="The job was not started before its deadline."
    )
    assert harness.log(late) == [
        Event(seq=1, type=EventType.QUEUED, attempt=0),
        Event(seq=2, type=EventType.EXPIRED, attempt=0),
    ]
    assert harness.queue.cancel(late) == "terminal"


def test_a_job_expires_deep_in_its_queue(harness: Harness) -> None:
    before = [harness.submit() for _ in range(50)]
    late = harness.submit(deadline_ms=harness.now() + 2_000)
    after = harness.submit()
    harness.advance(3_000)
    first = harness.claim_one().job.id
    assert first == before[0]
    assert harness.status(late) is Status.EXPIRED
    stats = harness.queue.stats(MODEL)
    assert (stats.depth, stats.in_flight) == (50, 1)
    rest = [claim.job.id for claim in harness.claim(60)]
    assert rest == [*before[1:], after]


def test_more_jobs_expire_than_one_claim_sees_to(harness: Harness) -> None:
    late = [harness.submit(deadline_ms=harness.now() + 2_000) for _ in range(150)]
    harness.submit("b")
    harness.advance(3_000)
    claims = [claim for _ in range(4) for claim in harness.claim(1)]
    assert [claim.job.tenant for claim in claims] == ["b"]
    assert {harness.status(job_id) for job_id in late} == {Status.EXPIRED}


def test_a_delayed_job_expires_too(harness: Harness) -> None:
    job_id = harness.submit(delay_ms=60_000, deadline_ms=harness.now() + 2_000)
    harness.advance(3_000)
    assert harness.claim() == []
    assert harness.status(job_id) is Status.EXPIRED
    assert harness.queue.stats(MODEL).delayed == 0


def test_a_job_that_was_started_in_time_may_run_on(harness: Harness) -> None:
    job_id = harness.submit(deadline_ms=harness.now() + 2_000)
    claim = harness.claim_one()
    harness.advance(5_000)
    harness.queue.sweep(MODEL)
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "ok"}
    assert harness.finish(claim)
    assert harness.status(job_id) is Status.COMPLETED


@pytest.mark.parametrize("way", ["requeue", "expiry"])
def test_a_job_that_comes_back_after_its_deadline_is_not_started_again(
    harness: Harness, way: str
) -> None:
    job_id = harness.submit(deadline_ms=harness.now() + 2_000)
    claim = harness.claim_one()
    harness.advance(LEASE_MS - 1_000 if way == "requeue" else LEASE_MS + 1_000)
    if way == "requeue":
        assert harness.queue.requeue(claim)
    assert harness.claim() == []
    assert harness.status(job_id) is Status.EXPIRED


def test_a_job_that_comes_back_before_its_deadline_is(harness: Harness) -> None:
    job_id = harness.submit(deadline_ms=harness.now() + 20_000)
    harness.queue.requeue(harness.claim_one())
    harness.advance(1_000)
    assert harness.claim_one().job.id == job_id


def test_a_parked_tenants_jobs_expire(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_in_flight=1))
    harness.submit("a")
    late = harness.submit("a", deadline_ms=harness.now() + 2_000)
    claim = harness.claim_one()
    harness.advance(3_000)
    harness.queue.sweep(MODEL)
    assert harness.status(late) is Status.EXPIRED
    harness.finish(claim)
    assert harness.claim() == []


def test_a_cancelled_job_does_not_expire_later(harness: Harness) -> None:
    job_id = harness.submit(deadline_ms=harness.now() + 2_000)
    harness.queue.cancel(job_id)
    harness.advance(3_000)
    harness.queue.sweep(MODEL)
    assert harness.status(job_id) is Status.CANCELLED


def test_an_expired_jobs_record_lives_as_long_as_a_result(harness: Harness) -> None:
    job_id = harness.submit(result_ttl_s=60, deadline_ms=harness.now() + 2_000)
    harness.advance(3_000)
    harness.queue.sweep(MODEL)
    harness.advance(50_000)
    assert harness.status(job_id) is Status.EXPIRED
    harness.advance(11_000)
    assert harness.queue.list_jobs("acme") == ([], False)
