"""Retries of failed and expired jobs, dead letters, cancelling many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broker.errors import JobNotFoundError, NotRetryableError, QueueFullError
from broker.jobs import Band, Event, EventType, JobError, Outcome, Status, Usage
from broker.stats import DeadLetter
from tests.contract.harness import LEASE_MS, MODEL, Harness, policy

ERROR = JobError(code="internal_error", message="It broke.")


def _fail(harness: Harness, **fields: Any) -> str:
    job_id = harness.submit(**fields)
    claim = harness.claim_one()
    assert claim.job.id == job_id
    outcome = Outcome(status=Status.FAILED, error=ERROR, usage=Usage(input_tokens=3))
    assert harness.queue.complete(claim, outcome)
    return job_id


def _bury(harness: Harness, tenant: str = "acme", **fields: Any) -> str:
    job_id = harness.submit(tenant, **fields)
    claim = harness.claim_one()
    assert claim.job.id == job_id
    assert harness.queue.bury(claim, "worker_lost", "It killed the engine.")
    return job_id


# -- retry ----------------------------------------------------------------------------------------
def test_a_failed_job_runs_again(harness: Harness) -> None:
    job_id = _fail(harness, result_ttl_s=60)
    created = harness.queue.get(job_id).created_ms
    harness.submit()
    accepted = harness.queue.retry(job_id, tenant="acme")
    assert (accepted.job_id, accepted.position, accepted.replayed) == (job_id, 1, False)
    job = harness.queue.get(job_id)
    assert (job.status, job.error, job.usage, job.seq) == (Status.QUEUED, None, Usage(), 4)
    assert (job.created_ms, job.started_ms, job.finished_ms) == (created, 0, 0)
    harness.advance(120_000)
    assert harness.status(job_id) is Status.QUEUED, "what waits has no lifetime"
    second = harness.claim(2)[1]
    assert (second.job.id, second.attempt) == (job_id, 2)
    assert harness.finish(second)
    assert [(event.seq, event.type) for event in harness.log(job_id)] == [
        (1, EventType.QUEUED),
        (2, EventType.IN_PROGRESS),
        (3, EventType.FAILED),
        (4, EventType.QUEUED),
        (5, EventType.IN_PROGRESS),
        (6, EventType.COMPLETED),
    ]
    harness.advance(61_000)
    with pytest.raises(JobNotFoundError):
        harness.queue.get(job_id)


def test_an_expired_job_runs_again_without_its_old_deadline(harness: Harness) -> None:
    job_id = harness.submit(deadline_ms=harness.now() + 1_000)
    harness.advance(2_000)
    harness.queue.sweep(MODEL)
    harness.queue.retry(job_id)
    assert harness.queue.get(job_id).deadline_ms == 0
    assert harness.log(job_id)[-1] == Event(seq=3, type=EventType.QUEUED, attempt=0)
    harness.advance(2_000)
    assert harness.claim_one().job.id == job_id


def test_a_retry_may_bring_a_deadline_of_its_own(harness: Harness) -> None:
    job_id = _fail(harness)
    harness.queue.retry(job_id, deadline_ms=harness.now() + 1_000)
    harness.advance(2_000)
    assert harness.claim() == []
    assert harness.status(job_id) is Status.EXPIRED


def test_a_retry_gives_all_attempts_again(harness: Harness) -> None:
    job_id = harness.submit(max_attempts=2)
    for _ in range(2):
        harness.queue.requeue(harness.claim_one())
    assert harness.status(job_id) is Status.FAILED
    harness.queue.retry(job_id)
    for attempt in (3, 4):
        claim = harness.claim_one()
        assert claim.attempt == attempt
        assert harness.status(job_id) is Status.IN_PROGRESS
        harness.queue.requeue(claim)
    assert harness.status(job_id) is Status.FAILED


def test_a_worker_of_the_first_life_can_change_nothing(harness: Harness) -> None:
    job_id = harness.submit(max_attempts=1)
    stale = harness.claim_one("w1")
    harness.advance(LEASE_MS + 1_000)
    harness.queue.sweep(MODEL)
    harness.queue.retry(job_id)
    current = harness.claim_one("w2")
    assert not harness.finish(stale)
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "lost"}
    assert harness.finish(current)


def test_only_what_failed_or_expired_is_retried(harness: Harness) -> None:
    waiting = harness.submit()
    claim = harness.claim_one()

    def refused(status: Status) -> None:
        with pytest.raises(NotRetryableError) as error:
            harness.queue.retry(waiting)
        assert (error.value.job_id, error.value.status) == (waiting, status)

    refused(Status.IN_PROGRESS)
    harness.queue.cancel(waiting)
    refused(Status.CANCELLING)
    harness.queue.complete(claim, Outcome(status=Status.CANCELLED))
    refused(Status.CANCELLED)
    waiting = harness.submit()
    refused(Status.QUEUED)
    harness.finish(harness.claim_one())
    refused(Status.COMPLETED)


def test_another_tenants_job_is_not_retried(harness: Harness) -> None:
    job_id = _fail(harness)
    for unknown, tenant in ((job_id, "other"), ("job_none", None)):
        with pytest.raises(JobNotFoundError):
            harness.queue.retry(unknown, tenant=tenant)
    assert harness.status(job_id) is Status.FAILED


def test_a_retry_needs_room(harness: Harness) -> None:
    job_id = _fail(harness)
    harness.queue.set_policy("acme", policy(max_queued=1))
    harness.submit()
    with pytest.raises(QueueFullError):
        harness.queue.retry(job_id)
    assert harness.status(job_id) is Status.FAILED


def test_a_cancelled_retry_ends_the_job(harness: Harness) -> None:
    job_id = _fail(harness)
    harness.queue.retry(job_id)
    assert harness.queue.cancel(job_id) == "cancelled"
    assert harness.claim() == []


# -- dead letters ---------------------------------------------------------------------------------
def test_a_dead_letter_tells_why(harness: Harness) -> None:
    job_id = _bury(harness, band=Band.BATCH)
    (letter,), more = harness.queue.dead_letters(MODEL)
    assert letter == DeadLetter(
        letter=letter.letter,
        job_id=job_id,
        tenant="acme",
        code="worker_lost",
        attempt=1,
        died_ms=letter.died_ms,
        alive=True,
        endpoint="/v1/chat/completions",
        band=Band.BATCH,
        error=JobError(code="worker_lost", message="It killed the engine."),
    )
    assert abs(letter.died_ms - harness.now()) < 10_000
    assert more is False


def test_dead_letters_come_in_pages_newest_first(harness: Harness) -> None:
    ids = [_bury(harness, f"t{n % 2}") for n in range(5)]
    page, more = harness.queue.dead_letters(MODEL, limit=3)
    assert ([each.job_id for each in page], more) == ([ids[4], ids[3], ids[2]], True)
    page, more = harness.queue.dead_letters(MODEL, limit=3, after=page[-1].letter)
    assert ([each.job_id for each in page], more) == ([ids[1], ids[0]], False)
    page, more = harness.queue.dead_letters(MODEL, tenant="t1", limit=1)
    assert ([each.job_id for each in page], more) == ([ids[3]], True)
    assert harness.queue.dead_letters(MODEL, tenant="t2") == ([], False)
    ((only,), _) = harness.queue.dead_letters(MODEL, job_id=ids[1])
    assert only.job_id == ids[1]
    assert harness.queue.dead_letters("never-used") == ([], False)


def test_a_letter_outlives_the_record(harness: Harness) -> None:
    job_id = _bury(harness, result_ttl_s=60)
    harness.advance(61_000)
    ((letter,), _) = harness.queue.dead_letters(MODEL)
    assert (letter.job_id, letter.code, letter.alive) == (job_id, "worker_lost", False)
    assert (letter.endpoint, letter.band, letter.error) == ("", None, None)
    assert harness.queue.replay_dead(MODEL) == []
    assert harness.queue.purge_dead(MODEL) == 1


def test_a_retried_job_is_no_dead_letter(harness: Harness) -> None:
    job_id = _bury(harness)
    harness.queue.retry(job_id)
    assert harness.queue.dead_letters(MODEL) == ([], False)
    harness.queue.bury(harness.claim_one(), "worker_lost", "Again.")
    ((letter,), _) = harness.queue.dead_letters(MODEL)
    assert (letter.job_id, letter.attempt) == (job_id, 2)


def test_replaying_dead_letters(harness: Harness) -> None:
    ids = [_bury(harness, tenant) for tenant in ("a", "b", "a", "b")]
    assert harness.queue.replay_dead(MODEL, job_id=ids[1]) == [ids[1]]
    assert harness.queue.replay_dead(MODEL, tenant="a", limit=1) == [ids[0]]
    assert harness.queue.replay_dead(MODEL) == [ids[2], ids[3]]
    assert harness.queue.replay_dead(MODEL) == []
    assert harness.queue.stats(MODEL).dead == 0
    assert sorted(claim.job.id for claim in harness.claim(9)) == sorted(ids)


def test_a_replay_stops_where_there_is_no_room(harness: Harness) -> None:
    ids = [_bury(harness) for _ in range(3)]
    harness.queue.set_policy("acme", policy(max_queued=2))
    assert harness.queue.replay_dead(MODEL) == ids[:2]
    assert [each.job_id for each in harness.queue.dead_letters(MODEL)[0]] == ids[2:]


def test_replaying_more_than_one_script_call_does(harness: Harness) -> None:
    ids = [_bury(harness) for _ in range(205)]
    assert harness.queue.replay_dead(MODEL) == ids


def test_purging_dead_letters(harness: Harness) -> None:
    ids = [_bury(harness, tenant) for tenant in ("a", "b", "a", "b")]
    assert harness.queue.purge_dead(MODEL, job_id=ids[0]) == 1
    assert harness.queue.purge_dead(MODEL, tenant="a") == 1
    assert harness.queue.purge_dead(MODEL) == 2
    assert harness.queue.purge_dead(MODEL) == 0
    assert harness.status(ids[0]) is Status.FAILED
    harness.queue.retry(ids[0])


def test_dead_letters_are_bounded(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    ids = [_bury(harness) for _ in range(1_003)]
    assert harness.queue.stats(MODEL).dead == 1_000
    assert harness.queue.dead_letters(MODEL, job_id=ids[2])[0] == []
    harness.queue.retry(ids[2])
    assert harness.queue.stats(MODEL).dead == 1_000


# -- cancelling many ------------------------------------------------------------------------------
def test_cancelling_many_at_once(harness: Harness) -> None:
    done = harness.submit()
    harness.finish(harness.claim_one())
    running = harness.submit()
    harness.claim_one()
    waiting = [harness.submit() for _ in range(3)]
    delayed = harness.submit(delay_ms=60_000)
    other = harness.submit("other")
    ids = [done, running, *waiting, delayed, other, "job_none"]
    assert harness.queue.cancel_many(ids, tenant="acme") == {
        done: "terminal",
        running: "cancelling",
        **dict.fromkeys((*waiting, delayed), "cancelled"),
    }
    assert harness.status(other) is Status.QUEUED
    assert harness.queue.cancel_many([other]) == {other: "cancelled"}
    assert harness.queue.cancel_many([]) == {}
    assert harness.claim(9) == []


def test_cancelling_more_than_one_script_call_does_in_any_order(harness: Harness) -> None:
    ids = [harness.submit() for _ in range(1_203)]
    order = ids[:400] + ids[:399:-1] + ids[5:9]
    results = harness.queue.cancel_many(order)
    assert len(results) == 1_203
    assert set(results.values()) == {"cancelled", "terminal"}
    assert harness.queue.stats(MODEL).depth == 0
