"""How many jobs could be claimed: what tickets are made from."""

from __future__ import annotations

from broker.jobs import Band, Status
from broker.policies import TenantPolicy
from tests.contract.harness import LEASE_MS, MODEL, Harness


def claimable(harness: Harness, most: int = 100) -> int:
    return harness.queue.count_claimable(MODEL, most)


def test_waiting_jobs_are_counted_up_to_a_bound(harness: Harness) -> None:
    assert claimable(harness) == 0
    for tenant, band in (("a", Band.BATCH), ("a", Band.STANDARD), ("b", Band.STANDARD)):
        harness.submit(tenant, band=band)
    assert claimable(harness) == 3
    assert claimable(harness, 2) == 2
    harness.claim_one()
    assert claimable(harness) == 2


def test_no_more_than_caps_let_run(harness: Harness) -> None:
    harness.queue.set_policy("a", TenantPolicy(max_in_flight=2))
    for _ in range(3):
        harness.submit("a", band=Band.BATCH)
        harness.submit("a", band=Band.INTERACTIVE)
    harness.submit("b")
    assert claimable(harness) == 3
    first, *_ = harness.claim(9)
    assert claimable(harness) == 0
    assert harness.finish(first)
    assert claimable(harness) == 1


def test_a_tenant_above_a_lowered_cap_counts_until_a_claim_has_parked_it(harness: Harness) -> None:
    for _ in range(3):
        harness.submit("a")
    harness.claim_one()
    harness.queue.set_policy("a", TenantPolicy(max_in_flight=1))
    assert claimable(harness) == 1
    assert harness.claim(9) == []
    assert claimable(harness) == 0


def test_a_paused_queue_has_none(harness: Harness) -> None:
    harness.submit()
    harness.queue.pause(MODEL)
    assert claimable(harness) == 0
    harness.queue.resume(MODEL)
    assert claimable(harness) == 1


def test_counting_takes_back_promotes_and_expires(harness: Harness) -> None:
    harness.submit("a")
    harness.claim_one()
    harness.submit("b", delay_ms=1_000)
    late = harness.submit("c", deadline_ms=harness.now() + 1_000)
    assert claimable(harness) == 1
    harness.advance(LEASE_MS + 1_000)
    assert claimable(harness) == 2
    assert harness.status(late) is Status.EXPIRED
