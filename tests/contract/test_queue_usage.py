"""What a tenant used by hour and model: every end once, in the hour in which it came."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from broker.jobs import Claim, Outcome, Status, Usage
from broker.usage import HOUR_MS, KEPT_S, MOST_HOURS, HourUsage
from tests.contract.harness import LEASE_MS, MODEL, Harness

USAGE = Usage(input_tokens=70, cached_tokens=40, output_tokens=20)


def _end(harness: Harness, claim: Claim, status: Status, usage: Usage = USAGE) -> bool:
    return harness.queue.complete(claim, Outcome(status=status, usage=usage))


def _total(hours: tuple[HourUsage, ...]) -> dict[str, int]:
    """Over hours and models, without what is zero: the hour may turn while a test runs."""
    totals: dict[str, Any] = {}
    for each in hours:
        for name, value in asdict(each).items():
            if name not in ("hour_ms", "model") and value:
                totals[name] = totals.get(name, 0) + value
    return totals


def _used(
    harness: Harness, tenant: str = "acme", hours: int = 24, **filters: Any
) -> dict[str, int]:
    return _total(harness.queue.usage(tenant, hours=hours, **filters).hours)


def test_each_end_counts_with_its_tokens(harness: Harness) -> None:
    for _ in range(3):
        harness.submit()
    harness.submit("other")
    ends = [Status.COMPLETED, Status.FAILED, Status.CANCELLED]
    before = harness.now()
    mine = [claim for claim in harness.claim(4) if claim.job.tenant == "acme"]
    for claim, status in zip(mine, ends, strict=True):
        assert _end(harness, claim, status)
    assert _used(harness) == {
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
        "input_tokens": 210,
        "cached_tokens": 120,
        "output_tokens": 60,
    }
    assert _used(harness, "other") == _used(harness, "nobody") == {}
    found = harness.queue.usage("acme", hours=24)
    assert {each.model for each in found.hours} == {MODEL}
    assert all(before // HOUR_MS <= each.hour_ms / HOUR_MS for each in found.hours)
    assert all(found.since_ms <= each.hour_ms <= found.until_ms for each in found.hours)
    assert found.since_ms % HOUR_MS == 0
    assert before <= found.until_ms <= harness.now()
    assert found.until_ms // HOUR_MS - found.since_ms // HOUR_MS == 23


def test_ends_without_a_worker_count_too(make_harness: Any) -> None:
    harness: Harness = make_harness(max_attempts=1)
    harness.queue.cancel(harness.submit())
    harness.queue.cancel(harness.submit(delay_ms=60_000))
    harness.submit(deadline_ms=harness.now() + 5_000)
    assert _used(harness) == {"cancelled": 2}
    harness.advance(6_000)
    assert harness.claim() == []
    assert _used(harness) == {"cancelled": 2, "expired": 1}

    harness.submit(max_attempts=1)
    harness.claim_one()
    harness.advance(LEASE_MS + 1)
    harness.queue.sweep(MODEL)
    stopped = harness.submit(max_attempts=2)
    claim = harness.claim_one()
    harness.queue.cancel(stopped)
    assert harness.queue.requeue(claim)
    assert _used(harness) == {"cancelled": 3, "expired": 1, "failed": 1}


def test_repeats_and_stale_attempts_count_nothing(harness: Harness) -> None:
    job_id = harness.submit()
    stale = harness.claim_one()
    harness.advance(LEASE_MS + 1)
    claim = harness.claim_one("w2")
    assert claim.job.id == job_id
    assert not _end(harness, stale, Status.COMPLETED)
    assert _used(harness) == {}
    for _ in range(2):
        assert harness.queue.bury(claim, "model_failed", "It failed.")
    assert not _end(harness, stale, Status.COMPLETED)
    harness.queue.cancel(job_id)
    assert _used(harness) == {"failed": 1}

    # A life of its own, with an end of its own.
    harness.queue.retry(job_id)
    assert _end(harness, harness.claim_one(), Status.COMPLETED)
    ended = {"failed": 1, "completed": 1}
    tokens = {"input_tokens": 70, "cached_tokens": 40, "output_tokens": 20}
    assert _used(harness) == ended | tokens
    harness.queue.erase(job_id)
    assert _used(harness) == ended | tokens


def test_models_and_hours_are_told_apart(harness: Harness) -> None:
    harness.submit()
    _end(harness, harness.claim_one(), Status.COMPLETED)
    harness.advance(30 * HOUR_MS)
    harness.submit(model="a|b")
    (claim,) = harness.queue.claim("a|b", "w1")
    _end(harness, claim, Status.FAILED, Usage(input_tokens=1))

    assert _used(harness) == {"failed": 1, "input_tokens": 1}
    assert _used(harness, model=MODEL) == {}
    assert _used(harness, hours=48, model="a|b") == {"failed": 1, "input_tokens": 1}
    found = harness.queue.usage("acme", hours=48).hours
    assert [each.model for each in found] == [MODEL, "a|b"]
    assert 29 <= (found[1].hour_ms - found[0].hour_ms) // HOUR_MS <= 31
    harness.advance((MOST_HOURS - 28) * HOUR_MS)
    assert [each.model for each in harness.queue.usage("acme", hours=MOST_HOURS).hours] == ["a|b"]


def test_a_day_is_kept_for_a_while(harness: Harness) -> None:
    harness.submit()
    _end(harness, harness.claim_one(), Status.COMPLETED)
    if harness.client is not None:
        (key,) = harness.client.scan_iter("fb:usage:*")
        assert KEPT_S - 60 < harness.client.ttl(key) <= KEPT_S
    harness.advance(KEPT_S * 1000 + HOUR_MS)
    assert _used(harness, hours=MOST_HOURS) == {}
    if harness.client is not None:
        assert list(harness.client.scan_iter("fb:usage:*")) == []
