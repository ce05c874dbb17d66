"""Leases: claiming, renewing, fencing, giving back, taking back."""

from __future__ import annotations

import pytest

from broker.jobs import Delta, EventType, JobError, Outcome, Status, Usage
from broker.policies import TenantPolicy
from tests.contract.harness import LEASE_MS, MODEL, Harness


def test_a_claim_carries_the_whole_job(harness: Harness) -> None:
    job_id = harness.submit(body=b"\x00\xff body", stream=True)
    claim = harness.claim_one()
    assert (claim.queue, claim.job.id, claim.attempt) == (MODEL, job_id, 1)
    assert claim.job == harness.queue.get(job_id)
    assert (claim.job.status, claim.job.body) == (Status.IN_PROGRESS, b"\x00\xff body")
    assert claim.job.started_ms >= claim.job.created_ms


def test_nothing_to_claim(harness: Harness) -> None:
    assert harness.claim(5) == []
    harness.submit()
    harness.claim_one()
    assert harness.claim(5) == []


def test_one_tenants_jobs_run_in_their_order(harness: Harness) -> None:
    ids = [harness.submit() for _ in range(6)]
    claims = harness.claim(2) + harness.claim(3) + harness.claim(3)
    assert [claim.job.id for claim in claims] == ids


def test_completing_a_job(harness: Harness) -> None:
    job_id = harness.submit()
    usage = Usage(input_tokens=7, output_tokens=5, cached_tokens=2)
    outcome = Outcome(status=Status.COMPLETED, output=b'{"a":"\xc3\xa9"}', usage=usage)
    assert harness.queue.complete(harness.claim_one(), outcome)
    job = harness.queue.get(job_id)
    assert (job.status, job.output, job.usage) == (Status.COMPLETED, outcome.output, usage)
    assert job.finished_ms >= job.started_ms > 0
    stats = harness.queue.stats(MODEL)
    assert (stats.depth, stats.in_flight, stats.dead, stats.top_tenants) == (0, 0, 0, ())


def test_failing_a_job(harness: Harness) -> None:
    job_id = harness.submit()
    error = JobError(code="context_length_exceeded", message="too long", param="messages")
    assert harness.queue.complete(harness.claim_one(), Outcome(status=Status.FAILED, error=error))
    job = harness.queue.get(job_id)
    assert (job.status, job.error, job.output) == (Status.FAILED, error, None)
    assert harness.queue.stats(MODEL).dead == 0


def test_burying_a_job(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    assert harness.queue.bury(claim, "worker_lost", "It killed the engine.")
    assert harness.queue.bury(claim, "worker_lost", "It killed the engine.")
    job = harness.queue.get(job_id)
    assert job.error == JobError(code="worker_lost", message="It killed the engine.")
    assert harness.queue.stats(MODEL).dead == 1


def test_a_repeated_completion_is_true_and_changes_nothing(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    assert harness.finish(claim)
    before, log = harness.queue.get(job_id), harness.log(job_id)
    other = Outcome(status=Status.FAILED, error=JobError(code="x", message="y"))
    assert harness.queue.complete(claim, other)
    assert (harness.queue.get(job_id), harness.log(job_id)) == (before, log)


def test_renewing_keeps_a_lease(harness: Harness) -> None:
    job_id = harness.submit()
    harness.claim_one()
    for _ in range(3):
        harness.advance(LEASE_MS * 2 // 3)
        assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "ok"}
        assert harness.claim() == []


def test_renewing_what_is_not_held_is_lost(harness: Harness) -> None:
    job_id = harness.submit()
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "lost"}
    claim = harness.claim_one()
    assert harness.queue.renew(MODEL, "w1", [(job_id, 2)]) == {job_id: "lost"}
    assert harness.queue.renew(MODEL, "w2", [(job_id, 1)]) == {job_id: "lost"}
    assert harness.queue.renew(MODEL, "w1", [("job_none", 1)]) == {"job_none": "lost"}
    assert harness.queue.renew(MODEL, "w1", []) == {}
    harness.finish(claim)
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "lost"}


def test_a_silent_workers_job_goes_to_another(harness: Harness) -> None:
    job_id = harness.submit()
    harness.claim_one("w1")
    harness.advance(LEASE_MS - 1_000)
    assert harness.claim(1, "w2") == []
    harness.advance(2_000)
    second = harness.claim_one("w2")
    assert (second.job.id, second.attempt) == (job_id, 2)
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "lost"}
    kinds = [(event.type, event.attempt) for event in harness.log(job_id)]
    assert kinds == [
        (EventType.QUEUED, 0),
        (EventType.IN_PROGRESS, 1),
        (EventType.REQUEUED, 1),
        (EventType.IN_PROGRESS, 2),
    ]


def test_a_stale_worker_can_change_nothing(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    stale = harness.claim_one("w1")
    harness.advance(LEASE_MS + 1_000)
    current = harness.claim_one("w2")
    before, log = harness.queue.get(job_id), harness.log(job_id)
    assert not harness.finish(stale)
    assert not harness.queue.bury(stale, "x", "y")
    delta = Delta(job_id=job_id, attempt=1, text="late")
    assert harness.queue.emit(MODEL, [delta]) == [job_id]
    assert (harness.queue.get(job_id), harness.log(job_id)) == (before, log)
    assert harness.queue.text(job_id) == ""
    assert harness.finish(current)
    assert not harness.finish(stale)
    assert not harness.queue.requeue(stale)


def test_a_job_given_up_goes_before_its_tenants_others(harness: Harness) -> None:
    first, second = harness.submit(), harness.submit()
    harness.claim_one()
    harness.advance(LEASE_MS + 1_000)
    assert [claim.job.id for claim in harness.claim(5)] == [first, second]


def test_giving_a_job_back(harness: Harness) -> None:
    job_id = harness.submit()
    claim = harness.claim_one()
    assert harness.queue.requeue(claim)
    assert harness.status(job_id) is Status.QUEUED
    assert harness.queue.requeue(claim), "a repeat is harmless"
    assert harness.claim_one().attempt == 2
    assert harness.queue.stats(MODEL).in_flight == 1


def test_giving_a_job_back_for_later(harness: Harness) -> None:
    job_id = harness.submit()
    assert harness.queue.requeue(harness.claim_one(), delay_ms=5_000)
    assert harness.claim() == []
    assert harness.queue.stats(MODEL).delayed == 1
    harness.advance(6_000)
    assert harness.claim_one().job.id == job_id


def test_a_refunded_attempt_does_not_count_but_still_fences(harness: Harness) -> None:
    job_id = harness.submit(max_attempts=1)
    first = harness.claim_one()
    assert harness.queue.requeue(first, refund=True)
    second = harness.claim_one()
    assert second.attempt == 2
    assert not harness.finish(first)
    assert harness.queue.requeue(first, refund=True), "the repeat of what was done"
    assert harness.status(job_id) is Status.IN_PROGRESS
    assert harness.finish(second)


@pytest.mark.parametrize("way", ["requeue", "release_owner", "expiry"])
def test_a_job_out_of_attempts_fails_and_is_kept_as_a_dead_letter(
    harness: Harness, way: str
) -> None:
    job_id = harness.submit(max_attempts=2)
    for _ in range(2):
        claim = harness.claim_one()
        if way == "requeue":
            assert harness.queue.requeue(claim)
        elif way == "release_owner":
            assert harness.queue.release_owner(MODEL, "w1") == 1
        else:
            harness.advance(LEASE_MS + 1_000)
    assert harness.claim() == []
    job = harness.queue.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert job.error.code == "max_attempts"
    assert not harness.finish(claim)
    stats = harness.queue.stats(MODEL)
    assert (stats.dead, stats.in_flight, stats.depth) == (1, 0, 0)
    assert harness.log(job_id)[-1].type is EventType.FAILED


def test_releasing_an_owner_gives_back_all_of_its_leases_and_no_others(harness: Harness) -> None:
    mine = [harness.submit() for _ in range(3)]
    theirs = harness.submit()
    harness.claim(3, "w1")
    harness.claim(1, "w10")
    assert harness.queue.release_owner(MODEL, "w1") == 3
    assert harness.queue.release_owner(MODEL, "w1") == 0
    assert harness.status(theirs) is Status.IN_PROGRESS
    assert sorted(claim.job.id for claim in harness.claim(9, "w2")) == sorted(mine)


def test_more_leases_than_one_script_gives_back(harness: Harness) -> None:
    harness.queue.set_policy("acme", TenantPolicy(max_in_flight=10_000))
    for _ in range(1_005):
        harness.submit()
    assert len(harness.claim(1_005)) == 1_005
    assert harness.queue.release_owner(MODEL, "w1") == 1_005
    assert harness.queue.stats(MODEL).depth == 1_005


def test_sweeping_takes_back_what_nobody_claims(harness: Harness) -> None:
    lost, late = harness.submit(max_attempts=1), harness.submit(delay_ms=1_000)
    harness.claim_one()
    assert harness.queue.sweep(MODEL) == 0
    harness.advance(LEASE_MS + 1_000)
    assert harness.queue.sweep(MODEL) == 1
    assert harness.status(lost) is Status.FAILED
    assert harness.queue.stats(MODEL).delayed == 0
    assert harness.claim_one().job.id == late


def test_queues_do_not_mix(harness: Harness) -> None:
    chat, embed = harness.submit(), harness.submit(model="embedder")
    assert harness.queue.queues() == ["embedder", MODEL]
    assert [claim.job.id for claim in harness.claim(9)] == [chat]
    (other,) = harness.queue.claim("embedder", "w1", limit=9)
    assert other.job.id == embed
    assert harness.queue.release_owner(MODEL, "w1") == 1
    assert harness.status(embed) is Status.IN_PROGRESS
