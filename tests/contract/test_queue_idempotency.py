"""Idempotency keys: a repeated request finds its job."""

from __future__ import annotations

from typing import Any

import pytest

from broker.errors import IdempotencyConflictError, JobNotFoundError
from broker.jobs import Band, NewJob, Status
from tests.contract.harness import MODEL, Harness, new_job, policy

HOUR_MS = 3_600_000


def _keyed(**fields: Any) -> NewJob:
    return new_job(**{"idempotency_key": "order-7", **fields})


def test_the_same_request_again_finds_the_first_job(harness: Harness) -> None:
    first, again = _keyed(), _keyed()
    accepted = harness.queue.enqueue(first)
    assert (accepted.job_id, accepted.replayed) == (first.id, False)
    replayed = harness.queue.enqueue(again)
    assert (replayed.job_id, replayed.replayed) == (first.id, True)
    assert harness.queue.stats(MODEL).depth == 1
    with pytest.raises(JobNotFoundError):
        harness.queue.get(again.id)
    harness.finish(harness.claim_one())
    assert harness.queue.enqueue(_keyed()).job_id == first.id
    assert harness.status(first.id) is Status.COMPLETED


@pytest.mark.parametrize(
    "other",
    [
        {"body": b"{}"},
        {"endpoint": "/v1/completions"},
        {"model": "embedder"},
        {"band": Band.BATCH},
        {"fingerprint": "f"},
    ],
)
def test_another_request_under_the_same_key_is_refused(
    harness: Harness, other: dict[str, Any]
) -> None:
    first = _keyed()
    harness.queue.enqueue(first)
    with pytest.raises(IdempotencyConflictError) as conflict:
        harness.queue.enqueue(_keyed(**other))
    assert conflict.value.job_id == first.id
    assert harness.queue.stats(MODEL).depth == 1


def test_a_fingerprint_of_the_callers_own_decides_alone(harness: Harness) -> None:
    first = _keyed(fingerprint="f|1", body=b"1")
    harness.queue.enqueue(first)
    assert harness.queue.enqueue(_keyed(fingerprint="f|1", body=b"2")).job_id == first.id
    with pytest.raises(IdempotencyConflictError):
        harness.queue.enqueue(_keyed(fingerprint="f|2", body=b"1"))


def test_keys_are_each_tenants_own(harness: Harness) -> None:
    jobs = [_keyed(tenant="a"), _keyed(tenant="b"), _keyed(tenant="a", idempotency_key="order-8")]
    for job in jobs:
        assert harness.queue.enqueue(job).job_id == job.id
    assert harness.queue.stats(MODEL).depth == 3


def test_the_very_same_job_again_is_no_replay_and_no_duplicate(harness: Harness) -> None:
    """The caller timed out, doesn't know whether it went in, and sends it once more."""
    harness.submit()
    job = _keyed()
    for _ in range(2):
        accepted = harness.queue.enqueue(job)
        assert (accepted.job_id, accepted.position, accepted.replayed) == (job.id, 1, False)
    assert harness.queue.stats(MODEL).depth == 2


def test_a_key_is_known_for_a_day(harness: Harness) -> None:
    first = _keyed(result_ttl_s=60)
    harness.queue.enqueue(first)
    harness.finish(harness.claim_one())
    harness.advance(23 * HOUR_MS)
    # Its result has expired; it doesn't run again all the same.
    assert harness.queue.enqueue(_keyed()).job_id == first.id
    harness.advance(2 * HOUR_MS)
    second = _keyed(body=b"other")
    assert harness.queue.enqueue(second).job_id == second.id


def test_a_refused_request_leaves_its_key_free(harness: Harness) -> None:
    harness.queue.set_policy("acme", policy(max_queued=1))
    harness.submit()
    with pytest.raises(Exception, match="full"):
        harness.queue.enqueue(_keyed())
    harness.claim_one()
    other = _keyed(body=b"other")
    assert harness.queue.enqueue(other).job_id == other.id


def test_a_replay_needs_no_room(harness: Harness) -> None:
    harness.queue.set_policy("acme", policy(max_queued=1))
    first = _keyed()
    harness.queue.enqueue(first)
    assert harness.queue.enqueue(_keyed()).job_id == first.id
