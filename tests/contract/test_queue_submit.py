"""Putting in, reading, listing and cancelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker.errors import DuplicateJobError, JobNotFoundError, QueueFullError
from broker.jobs import Band, Delta, Event, EventType, Outcome, Status, Usage
from tests.contract.harness import MODEL, Harness, new_job, policy

Make = Callable[..., Harness]


def test_a_job_keeps_what_it_was_given(harness: Harness) -> None:
    new = new_job(
        key_id="key_1",
        band=Band.STANDARD,
        cost=77,
        body="{“Zürich” \x00}".encode(),
        metadata=b'{"a":1}',
        stream=True,
        max_attempts=5,
        result_ttl_s=60,
        request_id="req_1",
    )
    assert harness.queue.enqueue(new).position == 0
    job = harness.queue.get(new.id)
    assert (job.id, job.tenant, job.key_id, job.model) == (new.id, "acme", "key_1", MODEL)
    assert (job.endpoint, job.band, job.cost) == (new.endpoint, Band.STANDARD, 77)
    assert (job.body, job.metadata, job.stream) == (new.body, new.metadata, True)
    assert (job.max_attempts, job.result_ttl_s, job.request_id) == (5, 60, "req_1")
    assert (job.status, job.attempt, job.seq) == (Status.QUEUED, 0, 1)
    assert job.created_ms > 1_600_000_000_000
    assert (job.started_ms, job.finished_ms) == (0, 0)
    assert (job.output, job.error, job.usage) == (None, None, Usage())


def test_position_counts_the_tenants_jobs_in_its_band(harness: Harness) -> None:
    assert harness.queue.enqueue(new_job("a")).position == 0
    assert harness.queue.enqueue(new_job("a")).position == 1
    assert harness.queue.enqueue(new_job("a", band=Band.BATCH)).position == 0
    assert harness.queue.enqueue(new_job("b")).position == 0


def test_the_same_id_twice_is_refused_and_changes_nothing(harness: Harness) -> None:
    first = new_job("a", body=b"1")
    harness.queue.enqueue(first)
    with pytest.raises(DuplicateJobError):
        harness.queue.enqueue(new_job("b", id=first.id, body=b"2"))
    assert harness.queue.get(first.id).body == b"1"
    assert harness.queue.stats(MODEL).depth == 1
    harness.finish(harness.claim_one())
    with pytest.raises(DuplicateJobError):
        harness.queue.enqueue(first)


def test_a_tenants_queue_is_bounded(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_queued=2))
    harness.submit("a")
    harness.submit("a", delay_ms=60_000)
    with pytest.raises(QueueFullError) as full:
        harness.submit("a")
    assert (full.value.scope, full.value.limit) == ("tenant", 2)
    harness.submit("b")
    harness.claim(2)
    harness.submit("a")


def test_the_default_bound_holds_for_whoever_has_no_policy(make_harness: Make) -> None:
    harness = make_harness(default_max_queued=1)
    harness.queue.set_policy("rich", policy(max_queued=2))
    harness.submit("a")
    with pytest.raises(QueueFullError):
        harness.submit("a")
    harness.submit("rich")
    harness.submit("rich")
    harness.queue.set_policy("rich", None)
    with pytest.raises(QueueFullError):
        harness.submit("rich")


def test_a_policy_of_star_is_everybodys_default(harness: Harness) -> None:
    harness.queue.set_policy("*", policy(max_queued=1))
    harness.submit("a")
    with pytest.raises(QueueFullError):
        harness.submit("a")


def test_the_queue_as_a_whole_is_bounded(make_harness: Make) -> None:
    harness = make_harness(max_queued_total=3)
    harness.submit("a")
    harness.submit("b", delay_ms=60_000)
    harness.submit("c", band=Band.BATCH)
    with pytest.raises(QueueFullError) as full:
        harness.submit("d")
    assert (full.value.scope, full.value.limit) == ("model", 3)
    harness.claim_one()
    harness.submit("d")


def test_a_refused_job_leaves_nothing_behind(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_queued=1))
    harness.submit("a")
    refused = new_job("a")
    with pytest.raises(QueueFullError):
        harness.queue.enqueue(refused)
    with pytest.raises(JobNotFoundError):
        harness.queue.get(refused.id)
    assert len(harness.queue.list_jobs("a")[0]) == 1


def test_another_tenants_job_is_not_found(harness: Harness) -> None:
    job_id = harness.submit("a")
    assert harness.queue.get(job_id, tenant="a").id == job_id
    for tenant in ("b", ""):
        with pytest.raises(JobNotFoundError):
            harness.queue.get(job_id, tenant=tenant)
    with pytest.raises(JobNotFoundError):
        harness.queue.cancel(job_id, tenant="b")
    assert harness.status(job_id) is Status.QUEUED


def test_an_unknown_job_is_not_found(harness: Harness) -> None:
    for call in (harness.queue.get, harness.queue.cancel, harness.queue.events):
        with pytest.raises(JobNotFoundError):
            call("job_none")
    assert harness.queue.text("job_none") == ""


def test_cancelling_a_waiting_job(harness: Harness) -> None:
    first, second = harness.submit(), harness.submit()
    assert harness.queue.cancel(first) == "cancelled"
    assert harness.status(first) is Status.CANCELLED
    assert harness.queue.get(first).finished_ms > 0
    assert harness.queue.cancel(first) == "terminal"
    assert [claim.job.id for claim in harness.claim(5)] == [second]


def test_cancelling_the_only_waiting_job(harness: Harness) -> None:
    job_id = harness.submit()
    assert harness.queue.cancel(job_id) == "cancelled"
    assert harness.claim() == []
    assert harness.queue.stats(MODEL).depth == 0
    again = harness.submit()
    assert harness.claim_one().job.id == again


def test_cancelling_a_delayed_job(harness: Harness) -> None:
    job_id = harness.submit(delay_ms=1_000)
    assert harness.queue.cancel(job_id) == "cancelled"
    harness.advance(2_000)
    assert harness.claim() == []


def test_cancelling_a_running_job(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    assert harness.queue.cancel(job_id) == "cancelling"
    assert harness.queue.cancel(job_id) == "cancelling"
    assert harness.status(job_id) is Status.CANCELLING
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "cancel"}
    partial = Outcome(status=Status.CANCELLED, output=b"{}", usage=Usage(input_tokens=3))
    assert harness.queue.complete(claim, partial)
    job = harness.queue.get(job_id)
    assert (job.status, job.output, job.usage.input_tokens) == (Status.CANCELLED, b"{}", 3)
    assert harness.queue.cancel(job_id) == "terminal"
    kinds = [event.type for event in harness.log(job_id)]
    assert kinds == [
        EventType.QUEUED,
        EventType.IN_PROGRESS,
        EventType.CANCELLING,
        EventType.CANCELLED,
    ]


@pytest.mark.parametrize("way", ["requeue", "release_owner", "expiry"])
def test_a_job_whose_cancel_is_wanted_never_runs_again(harness: Harness, way: str) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    harness.queue.cancel(job_id)
    if way == "requeue":
        assert harness.queue.requeue(claim)
    elif way == "release_owner":
        assert harness.queue.release_owner(MODEL, "w1") == 1
    else:
        harness.advance(11_000)
    assert harness.claim() == []
    assert harness.status(job_id) is Status.CANCELLED


def test_a_job_that_completes_before_it_hears_of_the_cancel_is_completed(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    harness.queue.cancel(job_id)
    assert harness.finish(claim)
    assert harness.status(job_id) is Status.COMPLETED


def test_a_delayed_job_waits_for_its_time(harness: Harness) -> None:
    late = harness.submit(delay_ms=5_000)
    soon = harness.submit()
    assert harness.queue.stats(MODEL).delayed == 1
    assert [claim.job.id for claim in harness.claim(5)] == [soon]
    harness.advance(4_000)
    assert harness.claim(5) == []
    harness.advance(2_000)
    assert [claim.job.id for claim in harness.claim(5)] == [late]


def test_a_finished_job_is_forgotten_after_its_lifetime(harness: Harness) -> None:
    job_id = harness.submit(result_ttl_s=60, stream=True)
    claim = harness.claim_one()
    harness.queue.emit(MODEL, [Delta(job_id=job_id, attempt=1, text="x")])
    harness.advance(3_000)
    harness.finish(claim)
    harness.advance(59_000)
    assert harness.status(job_id) is Status.COMPLETED
    assert harness.queue.text(job_id) == "x"
    harness.advance(2_000)
    with pytest.raises(JobNotFoundError):
        harness.queue.get(job_id)
    with pytest.raises(JobNotFoundError):
        harness.queue.events(job_id)
    assert harness.queue.text(job_id) == ""
    assert harness.queue.list_jobs("acme") == ([], False)


def test_an_unfinished_job_outlives_its_lifetime(harness: Harness) -> None:
    job_id = harness.submit(result_ttl_s=60)
    harness.advance(120_000)
    assert harness.status(job_id) is Status.QUEUED


def test_the_log_of_a_job_that_only_waits(harness: Harness) -> None:
    job_id = harness.submit()
    queued = Event(seq=1, type=EventType.QUEUED, attempt=0)
    assert harness.queue.events(job_id) == ([queued], True)
    assert harness.queue.events(job_id, after=1) == ([], True)
