"""Rate limits: taken at submit, put right at the end, never leaked."""

from __future__ import annotations

from typing import Any

import pytest

from broker.errors import DuplicateJobError, QueueFullError, RateLimitedError
from broker.jobs import JobError, NewJob, Outcome, Status, Usage
from broker.limits import RateLimits
from tests.contract.harness import LEASE_MS, MODEL, Harness, new_job, policy


def _job(
    tenant: str = "a", *, key: tuple[int, int] = (0, 0), key_jobs: int = 0, **fields: Any
) -> NewJob:
    limits = {
        name: fields.pop(name)
        for name in ("requests_per_minute", "tokens_per_minute", "max_jobs")
        if name in fields
    }
    key_limits = RateLimits(requests_per_minute=key[0], tokens_per_minute=key[1], max_jobs=key_jobs)
    values = {"key_id": "k1", "limits": RateLimits(**limits), "key_limits": key_limits, **fields}
    return new_job(tenant, **values)


def _accepted(harness: Harness, count: int, **fields: Any) -> list[str]:
    """Submit until `count` are in; the next one must be refused."""
    ids = []
    for _ in range(count):
        ids.append(harness.queue.enqueue(_job(**fields)).job_id)
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(**fields))
    return ids


def test_without_limits_nothing_is_told(harness: Harness) -> None:
    assert harness.queue.enqueue(_job()).limits == ()


def test_requests_per_minute(harness: Harness) -> None:
    states = [harness.queue.enqueue(_job(requests_per_minute=3)).limits for _ in range(3)]
    assert [each.remaining for (each,) in states] == [2, 1, 0]
    ((last,),) = states[2:]
    assert (last.scope, last.kind, last.limit) == ("tenant", "requests", 3)
    assert last.reset_ms == pytest.approx(60_000, abs=2_000)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(requests_per_minute=3))
    error = limited.value
    assert (error.scope, error.kind, error.limit) == ("tenant", "requests", 3)
    assert error.retry_after_ms == pytest.approx(20_000, abs=2_000)
    assert [each.remaining for each in error.limits] == [0]
    harness.advance(21_000)
    _accepted(harness, 1, requests_per_minute=3)
    assert harness.queue.stats(MODEL).depth == 4


def test_tokens_per_minute(harness: Harness) -> None:
    accepted = harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=600))
    assert [(each.kind, each.limit, each.remaining) for each in accepted.limits] == [
        ("tokens", 1_000, 400)
    ]
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=600))
    assert (limited.value.kind, limited.value.limit) == ("tokens", 1_000)
    assert limited.value.retry_after_ms == pytest.approx(12_000, abs=2_000)
    harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=400))


def test_a_refused_job_takes_nothing_of_any_limit(harness: Harness) -> None:
    fields: dict[str, Any] = {"requests_per_minute": 9, "tokens_per_minute": 1_000}
    harness.queue.enqueue(_job(cost=900, **fields))
    for _ in range(20):
        with pytest.raises(RateLimitedError):
            harness.queue.enqueue(_job(cost=900, **fields))
    harness.queue.set_policy("a", policy(max_queued=1))
    with pytest.raises(QueueFullError):
        harness.queue.enqueue(_job(cost=50, **fields))
    harness.queue.set_policy("a", None)
    requests, tokens = harness.queue.enqueue(_job(cost=50, **fields)).limits
    assert (requests.kind, requests.remaining) == ("requests", 7)
    # One more comes back every 60 ms.
    assert tokens.kind == "tokens"
    assert 50 <= tokens.remaining < 100


def test_a_key_has_limits_of_its_own(harness: Harness) -> None:
    for _ in range(2):
        harness.queue.enqueue(_job(requests_per_minute=3, key=(2, 0)))
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(requests_per_minute=3, key=(2, 0)))
    assert (limited.value.scope, limited.value.kind, limited.value.limit) == ("key", "requests", 2)
    states = harness.queue.enqueue(_job(requests_per_minute=3, key=(2, 5_000), key_id="k2")).limits
    assert [(each.scope, each.kind, each.remaining) for each in states] == [
        ("tenant", "requests", 0),
        ("key", "requests", 1),
        ("key", "tokens", 4_900),
    ]
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(requests_per_minute=3, key=(2, 0), key_id="k2"))
    assert limited.value.scope == "tenant"


def test_of_several_limits_the_one_that_takes_longest_is_named(harness: Harness) -> None:
    fields: dict[str, Any] = {"requests_per_minute": 1, "key": (2, 1_000), "cost": 1_000}
    harness.queue.enqueue(_job(**fields))
    harness.advance(30_000)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(**fields))
    assert limited.value.retry_after_ms == pytest.approx(30_000, abs=2_000)
    assert (limited.value.scope, limited.value.kind) == ("tenant", "requests")


def test_tenants_and_keys_of_one_name_do_not_mix(harness: Harness) -> None:
    _accepted(harness, 1, tenant="x", requests_per_minute=1, key_id="y")
    _accepted(harness, 1, tenant="y", key=(1, 0), key_id="x")
    _accepted(harness, 1, tenant="z", requests_per_minute=1, key_id="x")


def test_limits_are_of_all_models_together(harness: Harness) -> None:
    _accepted(harness, 1, requests_per_minute=2, model="embedder", key=(1, 0))
    harness.queue.enqueue(_job(requests_per_minute=2))
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(requests_per_minute=2))


def test_what_a_job_did_not_take_is_given_back(harness: Harness) -> None:
    harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=900, key=(0, 2_000)))
    harness.finish(harness.claim_one(), tokens=100)
    states = harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=1, key=(0, 2_000))).limits
    for each, expected in zip(states, (899, 1_899), strict=True):
        assert expected <= each.remaining < expected + 80  # some come back meanwhile


def test_what_a_job_took_beyond_its_estimate_is_taken(harness: Harness) -> None:
    harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=100))
    harness.finish(harness.claim_one(), tokens=900)
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=200))
    harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=50))


@pytest.mark.parametrize("way", ["cancel", "deadline", "lost", "failed"])
def test_a_job_that_took_nothing_gives_all_its_tokens_back(harness: Harness, way: str) -> None:
    fields: dict[str, Any] = {"tokens_per_minute": 100_000, "cost": 90_000, "max_attempts": 1}
    if way == "deadline":
        fields["deadline_ms"] = harness.now() + 1_000
    (job_id,) = _accepted(harness, 1, **fields)
    if way == "cancel":
        harness.queue.cancel(job_id)
    elif way == "deadline":
        harness.advance(2_000)
        harness.queue.sweep(MODEL)
    elif way == "lost":
        harness.claim_one()
        harness.advance(LEASE_MS + 1_000)
        harness.queue.sweep(MODEL)
    else:
        outcome = Outcome(status=Status.FAILED, error=JobError(code="x", message="y"))
        harness.queue.complete(harness.claim_one(), outcome)
    assert harness.queue.get(job_id).is_terminal
    (state,) = harness.queue.enqueue(_job(tokens_per_minute=100_000, cost=1)).limits
    assert state.remaining == pytest.approx(99_999, rel=0.01)


def test_settling_long_after_gives_no_more_than_a_full_minute(harness: Harness) -> None:
    harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=900, max_attempts=9))
    harness.advance(600_000)
    harness.finish(harness.claim_one(), tokens=1)
    (state,) = harness.queue.enqueue(_job(tokens_per_minute=1_000, cost=100)).limits
    assert state.remaining == 900


def test_a_repeated_completion_settles_once(harness: Harness) -> None:
    harness.queue.enqueue(_job(tokens_per_minute=100_000, cost=50_000))
    claim = harness.claim_one()
    usage = Usage(output_tokens=40_000)
    for _ in range(2):
        assert harness.queue.complete(claim, Outcome(status=Status.COMPLETED, usage=usage))
    (state,) = harness.queue.enqueue(_job(tokens_per_minute=100_000, cost=1)).limits
    assert 59_999 <= state.remaining < 69_000  # twice would be 69,999 and more


def test_a_retry_is_under_the_limits_too(harness: Harness) -> None:
    fields: dict[str, Any] = {"requests_per_minute": 2, "tokens_per_minute": 100_000}
    job = _job(cost=90_000, **fields)
    harness.queue.enqueue(job)
    outcome = Outcome(status=Status.FAILED, usage=Usage(input_tokens=5_000))
    harness.queue.complete(harness.claim_one(), outcome)
    states = harness.queue.retry(job.id).limits
    assert (states[0].kind, states[0].remaining) == ("requests", 0)
    assert 5_000 <= states[1].remaining < 9_500  # some come back meanwhile
    harness.queue.complete(harness.claim_one(), outcome)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.retry(job.id)
    assert (limited.value.kind, limited.value.limit) == ("requests", 2)
    assert harness.status(job.id) is Status.FAILED


def test_jobs_at_once(harness: Harness) -> None:
    ids = _accepted(harness, 3, max_jobs=3)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(max_jobs=3, model="embedder"))
    error = limited.value
    assert (error.scope, error.kind, error.limit, error.limits) == ("tenant", "jobs", 3, ())
    assert error.retry_after_ms == 5_000
    claim = harness.claim_one()
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(max_jobs=3))
    harness.finish(claim)
    _accepted(harness, 1, max_jobs=3, model="embedder")
    harness.queue.cancel(ids[1])
    _accepted(harness, 1, max_jobs=3, delay_ms=60_000)
    harness.queue.enqueue(_job("b", max_jobs=1))


def test_jobs_of_lost_workers_do_not_fill_the_bound_for_ever(harness: Harness) -> None:
    _accepted(harness, 2, max_jobs=2, max_attempts=1)
    harness.claim(2)
    harness.advance(LEASE_MS + 1_000)
    harness.queue.sweep(MODEL)
    _accepted(harness, 2, max_jobs=2)


def test_jobs_at_once_of_a_key(harness: Harness) -> None:
    harness.queue.enqueue(_job())  # accepted before the key had a bound
    ids = _accepted(harness, 2, key_jobs=2)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(key_jobs=2, model="embedder"))
    error = limited.value
    assert (error.scope, error.kind, error.limit, error.limits) == ("key", "jobs", 2, ())
    assert error.retry_after_ms == 5_000
    harness.queue.enqueue(_job(key_id="k2", key_jobs=1))
    harness.queue.enqueue(_job())  # the bound was taken away
    harness.queue.cancel(ids[0])
    _accepted(harness, 1, key_jobs=2, model="embedder", delay_ms=60_000)
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(key_jobs=2, max_jobs=1))
    assert limited.value.scope == "tenant"


@pytest.mark.parametrize("way", ["done", "cancel", "deadline", "lost", "erased"])
def test_lines_of_batches_are_under_no_limit_and_in_nobody_s_way(
    harness: Harness, way: str
) -> None:
    bounds: dict[str, Any] = {"max_jobs": 2, "requests_per_minute": 3, "key_jobs": 2}
    late = {"deadline_ms": harness.now() + 1_000} if way == "deadline" else {}
    lines = [_job(batch_line=True, max_attempts=1, **bounds, **late) for _ in range(5)]
    for line in lines:
        assert harness.queue.enqueue(line).limits == ()
    _accepted(harness, 2, **bounds)
    if way in ("done", "lost"):
        claims = harness.queue.claim(MODEL, "w1", limit=5)
        assert {claim.job.id for claim in claims} == {line.id for line in lines}
        if way == "done":
            for claim in claims:
                harness.finish(claim)
    elif way == "cancel":
        harness.queue.cancel_many([line.id for line in lines], tenant="a")
    elif way == "erased":
        for line in lines:
            harness.queue.erase(line.id)
    if way in ("deadline", "lost"):
        harness.advance(LEASE_MS + 2_000)
        harness.queue.sweep(MODEL)
    assert all(harness.queue.get(line.id).is_terminal for line in lines)
    # Their ends make no room either.
    with pytest.raises(RateLimitedError) as limited:
        harness.queue.enqueue(_job(max_jobs=2))
    assert (limited.value.scope, limited.value.kind) == ("tenant", "jobs")


@pytest.mark.parametrize("way", ["done", "cancel", "deadline", "lost", "failed", "erased"])
def test_a_place_of_a_key_is_free_when_its_job_ends(harness: Harness, way: str) -> None:
    late = {"deadline_ms": harness.now() + 1_000} if way == "deadline" else {}
    job = _job(key_jobs=1, max_attempts=1, **late)
    harness.queue.enqueue(job)
    if way not in ("cancel", "deadline", "erased"):
        claim = harness.claim_one()
        with pytest.raises(RateLimitedError):
            harness.queue.enqueue(_job(key_jobs=1))
    if way == "done":
        harness.finish(claim)
    elif way == "failed":
        error = JobError(code="x", message="y")
        harness.queue.complete(claim, Outcome(status=Status.FAILED, error=error))
    elif way == "cancel":
        harness.queue.cancel(job.id)
    elif way == "erased":
        harness.queue.erase(job.id)
    else:
        harness.advance(LEASE_MS + 2_000)
        harness.queue.sweep(MODEL)
    assert harness.queue.get(job.id).is_terminal
    (taken,) = _accepted(harness, 1, key_jobs=1)
    if way in ("deadline", "lost", "failed"):
        with pytest.raises(RateLimitedError) as limited:
            harness.queue.retry(job.id)
        assert limited.value.scope == "key"
        harness.queue.cancel(taken)
        harness.queue.retry(job.id)
        with pytest.raises(RateLimitedError):
            harness.queue.enqueue(_job(key_jobs=1))


def test_a_job_given_back_keeps_the_place_of_its_key(harness: Harness) -> None:
    harness.queue.enqueue(_job(key_jobs=1))
    harness.queue.requeue(harness.claim_one(), delay_ms=0, refund=True)
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(key_jobs=1))


def test_a_replay_takes_nothing_and_tells_the_limits(harness: Harness) -> None:
    first = _job(requests_per_minute=2, idempotency_key="x")
    harness.queue.enqueue(first)
    for _ in range(5):
        replayed = harness.queue.enqueue(_job(requests_per_minute=2, idempotency_key="x"))
        assert (replayed.job_id, replayed.limits[0].remaining) == (first.id, 1)
    with pytest.raises(DuplicateJobError):
        harness.queue.enqueue(_job(requests_per_minute=2, id=first.id))
    _accepted(harness, 1, requests_per_minute=2)
    assert harness.queue.enqueue(_job(requests_per_minute=2, idempotency_key="x")).replayed


def test_a_changed_limit_holds_from_the_next_request_on(harness: Harness) -> None:
    _accepted(harness, 2, requests_per_minute=2)
    # What is owed is owed for as long as it was; at 60 a minute a second makes room for one.
    harness.advance(1_100)
    (state,) = harness.queue.enqueue(_job(requests_per_minute=60)).limits
    assert state.limit == 60
    assert state.remaining < 10
    with pytest.raises(RateLimitedError):
        harness.queue.enqueue(_job(requests_per_minute=2))
