"""The lease registry on a queue that answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker import leases, renewal
from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.jobs import Band, Claim, Job, Status, Usage
from broker.leases import LeaseRegistry
from broker.stats import WorkerStatus
from tests.conftest import PATIENCE_S


def claim(job_id: str = "job_1", attempt: int = 1) -> Claim:
    job = Job(
        id=job_id,
        tenant="acme",
        key_id="",
        model="tiny",
        endpoint="/v1/test",
        band=Band.INTERACTIVE,
        status=Status.IN_PROGRESS,
        cost=1,
        body=b"{}",
        metadata=b"{}",
        stream=False,
        attempt=attempt,
        max_attempts=3,
        created_ms=0,
        started_ms=0,
        finished_ms=0,
        result_ttl_s=60,
        request_id="",
        seq=1,
        output=None,
        error=None,
        usage=Usage(),
    )
    return Claim(queue="tiny", job=job)


class FakeQueue:
    """What the registry needs of a `JobQueue`; notes what it is asked for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        #: Answers of `renew`; others are `ok`.
        self.answers: dict[str, str] = {}
        self.renewed: list[list[tuple[str, int]]] = []
        #: (job id, attempt, delay, refund)
        self.requeued: list[tuple[str, int, int, bool]] = []
        self.cancelled: list[str] = []
        self.beats: list[WorkerStatus] = []
        self.forgotten: list[str] = []
        self.away = False

    def _note(self) -> None:
        with self.changed:
            self.changed.notify_all()
        if self.away:
            raise BrokerUnavailableError("away")

    def await_(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def renew(self, queue: str, owner: str, names: Sequence[tuple[str, int]]) -> dict[str, str]:
        assert (queue, owner) == ("tiny", "host:1:a")
        self.renewed.append(list(names))
        self._note()
        return {job_id: self.answers.get(job_id, "ok") for job_id, _ in names}

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        self.requeued.append((claim.job.id, claim.attempt, delay_ms, refund))
        self._note()
        return True

    def cancel(self, job_id: str, *, tenant: str | None = None) -> str:
        self.cancelled.append(job_id)
        self._note()
        raise JobNotFoundError(job_id)

    def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        self.beats.append(status)
        self._note()

    def forget_worker(self, owner: str) -> None:
        self.forgotten.append(owner)
        self._note()

    def sweep(self, queue: str) -> int:
        return 0


STATUS = WorkerStatus(
    owner="host:1:a",
    queue="tiny",
    hostname="host",
    pid=1,
    engine="simulated",
    state="ready",
    capacity=4,
    jobs=0,
    steps=0,
    started_ms=0,
    seen_ms=0,
)


class Bench:
    """A running registry on a fake queue."""

    def __init__(self, **options: Any) -> None:
        self.queue = FakeQueue()
        self.healthy = True
        settings = {"ttl_s": 60.0, "renew_every_s": 0.02, "grace_s": 60.0} | options
        self.registry = LeaseRegistry(
            self.queue,  # type: ignore[arg-type]
            queue_name="tiny",
            owner="host:1:a",
            status=lambda: STATUS,
            healthy=lambda: self.healthy,
            **settings,
        )
        self.registry.start()

    def started(self, job_id: str = "job_1", attempt: int = 1) -> leases.Lease:
        self.registry.add([claim(job_id, attempt)])
        return self.registry.start_job(job_id)

    def ticks(self, count: int = 2) -> None:
        beats = len(self.queue.beats)
        self.queue.await_(lambda: len(self.queue.beats) >= beats + count)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.registry.stop()


@pytest.fixture
def brief() -> Iterator[Bench]:
    """Leases of a tenth of a second."""
    bench = Bench(ttl_s=0.1)
    yield bench
    bench.registry.stop()


def test_leases_are_renewed_by_id_and_attempt_until_settled(bench: Bench) -> None:
    lease = bench.started("job_1", attempt=2)
    bench.registry.add([claim("job_2")])
    bench.queue.await_(lambda: bench.queue.renewed)
    bench.ticks()
    assert bench.queue.renewed[-1] == [("job_1", 2), ("job_2", 1)]
    assert bench.registry.held == 2
    bench.registry.settle(lease)
    bench.ticks()
    assert bench.queue.renewed[-1] == [("job_2", 1)]
    assert not lease.stopping


def test_heartbeat_counts_the_jobs(bench: Bench) -> None:
    bench.started()
    bench.ticks()
    beat = bench.queue.beats[-1]
    assert (beat.jobs, beat.state) == (1, "ready")
    assert beat.seen_ms > 0


def test_lost_lease_is_told_and_not_renewed_any_more(bench: Bench) -> None:
    lease = bench.started()
    stopped = threading.Event()
    lease.on_stop(stopped.set)
    bench.queue.answers["job_1"] = "lost"
    assert stopped.wait(PATIENCE_S)
    assert lease.lost.is_set()
    assert not lease.cancelled.is_set()
    assert bench.registry.losses == 1
    asked = len(bench.queue.renewed)
    bench.ticks()
    assert len(bench.queue.renewed) == asked
    assert bench.registry.held == 1  # its thread is still busy
    bench.registry.settle(lease)
    assert bench.registry.held == 0
    assert bench.queue.requeued == []


def test_job_completed_during_a_renewal_is_not_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "SETTLING_S", 1.0)
    bench.queue.answers["job_1"] = "lost"
    lease = bench.started()
    bench.queue.await_(lambda: bench.queue.renewed)
    bench.registry.settle(lease)
    bench.ticks()
    assert bench.registry.losses == 0
    assert not lease.lost.is_set()


def test_lost_unstarted_job_is_not_started(bench: Bench) -> None:
    bench.registry.add([claim()])
    bench.queue.answers["job_1"] = "lost"
    bench.queue.await_(lambda: bench.registry.losses == 1)
    with pytest.raises(KeyError):
        bench.registry.start_job("job_1")


def test_cancel_is_told_and_the_lease_goes_on(bench: Bench) -> None:
    lease = bench.started()
    bench.queue.answers["job_1"] = "cancel"
    assert lease.cancelled.wait(PATIENCE_S)
    asked = len(bench.queue.renewed)
    bench.queue.await_(lambda: len(bench.queue.renewed) > asked)
    assert not lease.lost.is_set()


def test_late_listener_is_called_at_once(bench: Bench) -> None:
    lease = bench.started()
    bench.registry.cancel("job_1")
    assert lease.cancelled.wait(PATIENCE_S)
    bench.queue.await_(lambda: bench.queue.cancelled == ["job_1"])
    heard: list[int] = []
    lease.on_stop(lambda: heard.append(1))
    assert heard == [1]


def test_failing_listener_keeps_nobody_from_hearing(bench: Bench) -> None:
    lease = bench.started()
    heard = threading.Event()

    def fail() -> None:
        raise RuntimeError

    lease.on_stop(fail)
    lease.on_stop(heard.set)
    bench.registry.cancel("job_1")
    assert heard.wait(PATIENCE_S)


def test_job_starts_once(bench: Bench) -> None:
    bench.started()
    with pytest.raises(KeyError):
        bench.registry.start_job("job_1")
    with pytest.raises(KeyError):
        bench.registry.start_job("job_unknown")


def test_new_attempt_waits_for_the_end_of_the_old_one(bench: Bench) -> None:
    bench.started(attempt=1)
    assert bench.registry.add([claim(attempt=2)]) == []
    bench.queue.await_(lambda: bench.queue.requeued == [("job_1", 2, leases.RETRY_DELAY_MS, True)])


def test_unhealthy_worker_takes_and_renews_nothing(brief: Bench) -> None:
    lease = brief.started()
    brief.queue.await_(lambda: brief.queue.renewed)
    brief.healthy = False
    assert not brief.registry.accepting
    assert lease.lost.wait(PATIENCE_S)


def test_leases_outlive_a_short_outage_and_are_lost_in_a_long_one(brief: Bench) -> None:
    lease = brief.started()
    brief.ticks(1)
    with capture_logs() as logs:
        brief.queue.away = True
        assert lease.lost.wait(PATIENCE_S)
        brief.queue.away = False
        brief.ticks()
    events = [line["event"] for line in logs]
    assert events.count("broker_lost") == 1
    assert events.count("broker_found") == 1


def test_never_started_job_goes_back_without_a_charge(brief: Bench) -> None:
    brief.registry.add([claim()])
    brief.queue.await_(lambda: brief.queue.requeued == [("job_1", 1, leases.RETRY_DELAY_MS, True)])
    assert brief.registry.held == 0


def test_job_of_a_dead_thread_goes_back(bench: Bench) -> None:
    thread = threading.Thread(target=bench.started)
    thread.start()
    thread.join()
    bench.queue.await_(lambda: bench.queue.requeued == [("job_1", 1, leases.RETRY_DELAY_MS, False)])


def test_acknowledged_but_unsettled_job_goes_back_and_is_charged(bench: Bench) -> None:
    bench.started()
    with capture_logs() as logs:
        bench.registry.acknowledge("job_1:1")
    assert [line["event"] for line in logs] == ["job_left_unsettled"]
    bench.queue.await_(lambda: bench.queue.requeued == [("job_1", 1, leases.RETRY_DELAY_MS, False)])


def test_acknowledgement_of_a_settled_job_changes_nothing(bench: Bench) -> None:
    bench.registry.settle(bench.started())
    bench.started(attempt=2)
    bench.registry.acknowledge("job_1:1")
    bench.registry.reject("job_1:1", requeue=True)
    bench.ticks()
    assert bench.queue.requeued == []
    assert bench.registry.held == 1


@pytest.mark.parametrize(("requeue", "back"), [(True, (0, True)), (False, (1_000, False))])
def test_rejected_job_goes_back(bench: Bench, requeue: bool, back: tuple[int, bool]) -> None:
    bench.registry.add([claim()])
    bench.registry.reject("job_1:1", requeue=requeue)
    bench.queue.await_(lambda: bench.queue.requeued == [("job_1", 1, *back)])


def test_drain_hands_back_the_unstarted_and_waits_for_the_rest(bench: Bench) -> None:
    lease = bench.started("job_1")
    bench.registry.add([claim("job_2")])
    woken = threading.Event()
    bench.registry.on_drain = woken.set
    bench.registry.drain()
    bench.registry.drain()
    assert woken.wait(PATIENCE_S)
    assert not bench.registry.accepting
    bench.queue.await_(lambda: bench.queue.requeued == [("job_2", 1, 0, True)])
    with pytest.raises(KeyError):
        bench.registry.start_job("job_2")
    assert bench.registry.add([claim("job_3")]) == []
    bench.queue.await_(lambda: ("job_3", 1, 0, True) in bench.queue.requeued)
    bench.queue.await_(lambda: bench.queue.beats[-1].state == "draining")
    assert not bench.registry.drained.is_set()
    assert not lease.stopping
    bench.registry.settle(lease)
    assert bench.registry.drained.is_set()


def test_drain_ends_with_the_grace_time() -> None:
    bench = Bench(grace_s=0.05)
    lease = bench.started()
    bench.registry.drain()
    assert bench.registry.drained.wait(PATIENCE_S)
    assert lease.lost.is_set()
    assert bench.queue.requeued == [("job_1", 1, 0, False)]
    assert bench.registry.losses == 0
    bench.registry.stop()


def test_drain_with_nothing_to_do_is_over_at_once(bench: Bench) -> None:
    bench.registry.drain()
    assert bench.registry.drained.wait(PATIENCE_S)


def test_stop_hands_everything_back_and_forgets_the_worker(bench: Bench) -> None:
    lease = bench.started("job_1")
    bench.registry.add([claim("job_2")])
    bench.registry.stop()
    bench.registry.stop()
    assert sorted(bench.queue.requeued) == [("job_1", 1, 0, False), ("job_2", 1, 0, True)]
    assert lease.lost.is_set()
    assert bench.queue.forgotten == ["host:1:a"]


def test_broken_health_check_counts_as_unhealthy(bench: Bench) -> None:
    def broken() -> bool:
        raise RuntimeError

    bench.registry._healthy = broken
    with capture_logs() as logs:
        assert not bench.registry.accepting
    assert "health_check_failed" in [line["event"] for line in logs]


def test_process_has_one_registry(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match="no lease registry"):
        leases.current()
    leases.install(bench.registry)
    try:
        assert leases.current() is leases.installed() is bench.registry
    finally:
        leases.install(None)
