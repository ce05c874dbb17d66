"""Statistics and workers."""

from __future__ import annotations

from typing import Any

from broker.jobs import Band
from broker.stats import TenantStats, WorkerStatus
from tests.contract.harness import MODEL, Harness


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
