"""Statistics and workers."""

from __future__ import annotations

from typing import Any

import pytest

from broker.jobs import Band, Delta
from broker.stats import TenantStats, WorkerStatus
from tests.contract.harness import LEASE_MS, MODEL, Harness


def _worker(owner: str, **fields: Any) -> WorkerStatus:
    values: dict[str, Any] = {
        "queue": MODEL,
        "hostname": "h",
        "pid": 1,
        "engine": "simulated",
        "state": "ready",
        "capacity": 8,
        "jobs": 0,
        "steps": 0,
        "started_ms": 1_700_000_000_000,
        "seen_ms": 1_700_000_000_001,
        **fields,
    }
    return WorkerStatus(owner=owner, **values)


def test_an_empty_queue(harness: Harness) -> None:
    stats = harness.queue.stats("never-used")
    assert (stats.queue, stats.depth, stats.delayed, stats.in_flight) == ("never-used", 0, 0, 0)
    assert [band.band for band in stats.bands] == list(Band)
    assert [band.oldest_ms for band in stats.bands] == [0, 0, 0]
    assert harness.queue.queues() == []


def test_depth_age_and_counts(harness: Harness) -> None:
    for _ in range(3):
        harness.submit("a")
    harness.submit("b", band=Band.BATCH)
    harness.submit("c", delay_ms=60_000)
    harness.advance(2_000)
    harness.claim(1)
    stats = harness.queue.stats(MODEL)
    assert {band.band: band.depth for band in stats.bands} == {
        Band.INTERACTIVE: 2,
        Band.STANDARD: 0,
        Band.BATCH: 1,
    }
    ages = {band.band: band.oldest_ms for band in stats.bands}
    assert 2_000 <= ages[Band.INTERACTIVE] < 60_000
    assert ages[Band.STANDARD] == 0
    assert (stats.depth, stats.delayed, stats.in_flight, stats.dead) == (3, 1, 1, 0)


def test_the_busiest_tenants(harness: Harness) -> None:
    for tenant, jobs in (("a", 1), ("b", 4), ("c", 2)):
        for _ in range(jobs):
            harness.submit(tenant)
    harness.claim(3)
    top = harness.queue.stats(MODEL, top=2).top_tenants
    assert [row.tenant for row in top] == ["b", "c"]
    assert top[0] == TenantStats(tenant="b", queued=3, in_flight=1)
    assert harness.queue.stats(MODEL, top=0).top_tenants == ()


def test_workers_say_they_live(harness: Harness) -> None:
    assert harness.queue.workers() == []
    harness.queue.heartbeat(_worker("h:1:a", state="loading"), ttl_s=10)
    harness.queue.heartbeat(_worker("h:2:b"), ttl_s=30)
    harness.advance(2_000)
    harness.queue.heartbeat(_worker("h:1:a"), ttl_s=10)
    assert sorted(harness.queue.workers(), key=lambda each: each.owner) == [
        _worker("h:1:a"),
        _worker("h:2:b"),
    ]
    harness.advance(12_000)
    assert [each.owner for each in harness.queue.workers()] == ["h:2:b"]
    harness.queue.forget_worker("h:2:b")
    assert harness.queue.workers() == []


def test_ping(harness: Harness) -> None:
    harness.queue.ping()


def test_drain_rates_of_the_queue_and_of_tenants(harness: Harness) -> None:
    for tenant in ("a", "a", "a", "b"):
        harness.submit(tenant)
    for _ in range(4):
        claim = harness.claim_one()
        harness.advance(2_000)
        harness.finish(claim, tokens=50)
    harness.submit("a")
    harness.submit("b")
    stats = harness.queue.stats(MODEL)
    assert stats.jobs_per_s == pytest.approx(0.5, rel=0.1)
    assert stats.tokens_per_s == pytest.approx(25, rel=0.1)
    rows = {row.tenant: row for row in stats.top_tenants}
    assert rows["a"].jobs_per_s == pytest.approx(3 / 8, rel=0.1)
    assert rows["b"].tokens_per_s > 0
    assert harness.queue.stats("never-used").jobs_per_s == 0


def test_refused_writes_are_counted(harness: Harness) -> None:
    job_id = harness.submit()
    stale = harness.claim_one("w1")
    harness.advance(LEASE_MS + 1_000)
    current = harness.claim_one("w2")
    assert harness.queue.stats(MODEL).stale_writes == 0
    harness.finish(stale)
    harness.queue.requeue(stale)
    harness.queue.emit(MODEL, [Delta(job_id=job_id, attempt=1, text="x")])
    assert harness.queue.stats(MODEL).stale_writes == 3
    harness.finish(current)
    harness.finish(current)
    assert harness.queue.stats(MODEL).stale_writes == 3


def test_who_holds_what(harness: Harness) -> None:
    ids = [harness.submit(f"t{n}") for n in range(3)]
    harness.submit("waiting")
    harness.claim(2, "w1")
    harness.advance(2_000)
    harness.claim(1, "w2")
    leases = harness.queue.leases(MODEL)
    assert [(each.job_id, each.tenant, each.attempt, each.owner) for each in leases] == [
        (ids[0], "t0", 1, "w1"),
        (ids[1], "t1", 1, "w1"),
        (ids[2], "t2", 1, "w2"),
    ]
    now = harness.now()
    assert now - leases[0].renewed_ms == pytest.approx(2_000, abs=1_500)
    assert leases[2].expires_ms - now == pytest.approx(LEASE_MS, abs=1_500)
    assert leases[2].started_ms == harness.queue.get(ids[2]).started_ms
    harness.queue.renew(MODEL, "w1", [(ids[0], 1)])
    assert [each.job_id for each in harness.queue.leases(MODEL, owner="w1")] == [ids[1], ids[0]]
    assert [each.job_id for each in harness.queue.leases(MODEL, limit=1)] == [ids[1]]
    assert [each.job_id for each in harness.queue.leases(MODEL, owner="w2", limit=1)] == [ids[2]]
    assert harness.queue.leases(MODEL, owner="w3") == []
    assert harness.queue.leases("never-used") == []


def test_a_tenants_part_of_a_queue(harness: Harness) -> None:
    nothing = harness.queue.tenant_queue("never-used", "a")
    assert (nothing.delayed, nothing.in_flight, nothing.jobs_per_s) == (0, 0, 0.0)
    assert [(each.band, each.depth) for each in nothing.bands] == [(band, 0) for band in Band]
    for tenant, band, delay_ms in (
        ("a", Band.STANDARD, 0),
        ("b", Band.STANDARD, 0),
        ("a", Band.STANDARD, 0),
        ("a", Band.BATCH, 0),
        ("a", Band.BATCH, 60_000),
    ):
        harness.submit(tenant, band=band, delay_ms=delay_ms)
    assert harness.claim_one().job.tenant == "a"
    part = harness.queue.tenant_queue(MODEL, "a")
    assert [each.depth for each in part.bands] == [0, 1, 1]
    assert all(0 <= each.oldest_ms < 10_000 for each in part.bands)
    assert (part.queue, part.mode, part.delayed, part.in_flight) == (MODEL, "running", 1, 1)
    other = harness.queue.tenant_queue(MODEL, "b")
    assert [each.depth for each in other.bands] == [0, 1, 0]
    assert (other.delayed, other.in_flight) == (0, 0)
