"""Tickets in a worker, with the queue in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from broker.errors import BrokerUnavailableError
from broker.jobs import Band, Claim, NewJob, Outcome, Status
from broker.leases import LeaseRegistry
from broker.memory import MemoryQueue
from broker.stats import WorkerStatus
from config.settings import Queue
from workers import turns
from workers.metrics import WorkerMetrics
from workers.turns import Turns

MODEL = "m"


class FlakyQueue(MemoryQueue):
    """Isn't there for the first claims."""

    outages = 0

    def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        if self.outages:
            self.outages -= 1
            raise BrokerUnavailableError("away")
        return super().claim(queue, owner, limit=limit, batch_room=batch_room)


class Bench:
    """A worker whose jobs are completed by the word."""

    def __init__(self) -> None:
        self.queue = FlakyQueue(Queue())
        self.error: Exception | None = None
        #: Done while a job runs.
        self.meanwhile: Callable[[], object] | None = None
        self.seen: list[dict[str, str]] = []
        self.registry = LeaseRegistry(
            self.queue,
            queue_name=MODEL,
            owner="w",
            ttl_s=60,
            renew_every_s=60,
            status=lambda: WorkerStatus(
                owner="w", queue=MODEL, hostname="h", pid=1, engine="simulated", state="ready",
                capacity=1, jobs=0, steps=0, started_ms=0, seen_ms=0,
            ),
            healthy=lambda: True,
            batch_slots=lambda: 1,
            slots=lambda: 2,
        )  # fmt: skip
        self.metrics = CollectorRegistry()
        self.turns = Turns(
            self.registry, self, WorkerMetrics(MODEL, "simulated", registry=self.metrics)
        )

    def run(self, job_id: str) -> None:
        self.seen.append(dict(turns.jobs))
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        lease = self.registry.start_job(job_id)
        if self.error is not None:
            raise self.error
        assert self.queue.complete(lease.claim, Outcome(status=Status.COMPLETED))
        self.registry.settle(lease)

    def put(self, band: Band = Band.INTERACTIVE) -> str:
        job = NewJob(tenant="a", model=MODEL, endpoint="/v1/x", body=b"{}", band=band)
        self.queue.enqueue(job)
        return job.id

    def taken(self, found: str) -> float:
        labels = {"model": MODEL, "engine": "simulated", "found": found}
        return self.metrics.get_sample_value("forebay_workers_tickets_taken_total", labels) or 0.0


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.registry.start()
    yield bench
    bench.registry.stop()


def test_a_ticket_brings_the_next_job(bench: Bench) -> None:
    first, second = bench.put(), bench.put()
    assert [bench.turns.take("t1"), bench.turns.take("t2")] == [first, second]
    assert bench.seen == [{"t1": first}, {"t2": second}]
    assert turns.jobs == {}
    assert (bench.registry.held, bench.taken("job"), bench.taken("nothing")) == (0, 2, 0)


def test_a_ticket_too_many_is_spent_for_nothing(bench: Bench) -> None:
    assert bench.turns.take("t1") is None
    assert bench.taken("nothing") == 1


def test_batch_jobs_take_the_slots_that_are_theirs(bench: Bench) -> None:
    first, second, urgent = bench.put(Band.BATCH), bench.put(Band.BATCH), None

    def beside() -> None:
        nonlocal urgent
        assert bench.turns.take("t2") is None
        urgent = bench.put()
        assert bench.turns.take("t3") == urgent

    bench.meanwhile = beside
    assert bench.turns.take("t1") == first
    assert bench.queue.get(second).status is Status.QUEUED
    assert bench.turns.take("t4") == second


def test_a_ticket_is_kept_while_the_queue_is_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "RETRY_S", 0.001)
    job_id = bench.put()
    bench.queue.outages = 2
    assert bench.turns.take("t1") == job_id


def test_a_worker_that_is_told_to_go_claims_nothing(bench: Bench) -> None:
    job_id = bench.put()
    bench.registry.drain()
    assert bench.turns.take("t1") is None
    assert bench.queue.get(job_id).status is Status.QUEUED


def test_a_job_that_nobody_settled_goes_back(bench: Bench) -> None:
    job_id = bench.put()
    bench.error = ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        bench.turns.take("t1")
    assert turns.jobs == {}
    bench.registry.stop()
    assert (bench.queue.get(job_id).status, bench.registry.held) == (Status.QUEUED, 0)
