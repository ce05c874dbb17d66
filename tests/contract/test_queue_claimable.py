"""How many jobs could be claimed: what tickets are made from."""

from __future__ import annotations

import pytest

from broker import keys
from broker.jobs import Band, Status
from broker.policies import TenantPolicy
from tests.contract.harness import LEASE_MS, MODEL, Harness


def claimable(harness: Harness, most: int = 100) -> int:
    found = harness.queue.count_claimable(MODEL, most)
    assert found.here == 0
    return found.anywhere


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


def test_batch_jobs_are_counted_for_who_has_room(harness: Harness) -> None:
    harness.queue.set_policy("a", TenantPolicy(max_in_flight=3))
    for _ in range(4):
        harness.submit("a", band=Band.BATCH)
        harness.submit("b", band=Band.BATCH)
    harness.submit("a")
    count = harness.queue.count_claimable
    # One of a's three places is for its urgent job.
    assert [count(MODEL, 100, batch_room=room) for room in (0, 4, 9)] == [(1, 0), (1, 4), (1, 6)]
    assert count(MODEL, 100) == (7, 0)
    assert count(MODEL, 3, batch_room=9) == (1, 2)
    assert count(MODEL, 1, batch_room=9) == (1, 0)


def test_who_has_no_room_tells_others_of_batch_jobs(harness: Harness) -> None:
    if harness.client is None:
        pytest.skip("no bells in memory")
    harness.submit("a", band=Band.BATCH)
    bell = keys.batch_bell(MODEL)
    for room in (3, None):
        harness.queue.count_claimable(MODEL, 9, batch_room=room)
        assert harness.client.llen(bell) == 0
    for _ in range(2):
        harness.queue.count_claimable(MODEL, 9, batch_room=0)
        assert harness.client.llen(bell) == 1
    harness.client.delete(bell)
    harness.submit("a")
    # A claim for that one tells them.
    harness.queue.count_claimable(MODEL, 9, batch_room=0)
    assert harness.client.llen(bell) == 0
