"""Pausing, draining and resuming a queue."""

from __future__ import annotations

import pytest

from broker.errors import QueueDrainingError
from broker.jobs import Outcome, Status
from tests.contract.harness import LEASE_MS, MODEL, Harness, new_job


def _mode(harness: Harness, queue: str = MODEL) -> str:
    return harness.queue.stats(queue).mode


def test_nothing_is_claimed_from_a_paused_queue(harness: Harness) -> None:
    assert _mode(harness) == "running"
    first = harness.submit()
    running = harness.claim_one()
    harness.queue.pause(MODEL)
    assert _mode(harness) == "paused"
    second = harness.submit()
    assert harness.claim(9) == []
    assert harness.queue.renew(MODEL, "w1", [(first, 1)]) == {first: "ok"}
    assert harness.finish(running)
    harness.queue.resume(MODEL)
    assert _mode(harness) == "running"
    assert [claim.job.id for claim in harness.claim(9)] == [second]


def test_a_paused_queue_still_looks_after_its_jobs(harness: Harness) -> None:
    lost = harness.submit()
    harness.claim_one()
    late = harness.submit(deadline_ms=harness.now() + 1_000)
    delayed = harness.submit(delay_ms=1_000)
    doomed = harness.submit()
    harness.queue.pause(MODEL)
    harness.advance(LEASE_MS + 1_000)
    assert harness.claim(9) == []
    assert harness.status(lost) is Status.QUEUED
    assert harness.status(late) is Status.EXPIRED
    assert harness.queue.cancel(doomed) == "cancelled"
    harness.queue.resume(MODEL)
    assert [claim.job.id for claim in harness.claim(9)] == [lost, delayed]


def test_a_draining_queue_takes_nothing_new_and_runs_what_it_has(harness: Harness) -> None:
    ids = [harness.submit() for _ in range(3)]
    failed = harness.claim_one()
    harness.queue.complete(failed, Outcome(status=Status.FAILED))
    handed_back = harness.claim_one()
    harness.queue.drain(MODEL)
    assert _mode(harness) == "draining"
    with pytest.raises(QueueDrainingError):
        harness.submit()
    with pytest.raises(QueueDrainingError):
        harness.queue.retry(failed.job.id)
    assert harness.queue.requeue(handed_back)
    assert [claim.job.id for claim in harness.claim(9)] == ids[1:]
    harness.queue.resume(MODEL)
    harness.queue.retry(failed.job.id)
    harness.submit()
    assert len(harness.claim(9)) == 2


def test_dead_letters_are_not_replayed_into_a_draining_queue(harness: Harness) -> None:
    job_id = harness.submit()
    harness.queue.bury(harness.claim_one(), "worker_lost", "Lost.")
    harness.queue.drain(MODEL)
    assert harness.queue.replay_dead(MODEL) == []
    harness.queue.resume(MODEL)
    assert harness.queue.replay_dead(MODEL) == [job_id]


def test_a_replayed_request_is_answered_while_draining(harness: Harness) -> None:
    job_id = harness.submit(idempotency_key="x")
    harness.queue.drain(MODEL)
    assert harness.queue.enqueue(new_job(idempotency_key="x")).job_id == job_id


def test_of_pause_and_drain_the_later_one_counts(harness: Harness) -> None:
    harness.submit()
    harness.queue.pause(MODEL)
    harness.queue.drain(MODEL)
    assert len(harness.claim(9)) == 1
    harness.queue.pause(MODEL)
    harness.submit()
    assert harness.claim(9) == []


def test_each_queue_has_its_own_mode_even_before_it_is_used(harness: Harness) -> None:
    harness.queue.drain("embedder")
    assert (_mode(harness), _mode(harness, "embedder")) == ("running", "draining")
    assert harness.queue.queues() == ["embedder"]
    harness.submit()
    with pytest.raises(QueueDrainingError):
        harness.submit(model="embedder")
