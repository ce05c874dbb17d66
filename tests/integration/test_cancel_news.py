"""A cancel reaches the worker's lease at once, and again after the connection was lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker import keys, leases
from broker.cancels import CancelListener
from broker.connections import connect
from broker.jobs import NewJob
from broker.leases import Lease, LeaseRegistry
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from config.settings import Queue, Redis
from tests.conftest import PATIENCE_S
from tests.integration.worker_lab import until

OWNER, MODEL = "host:1:a", "tiny"


class Worker:
    """A registry that renews so seldom that no cancel comes with it, and a listener."""

    def __init__(self, url: str) -> None:
        self.client = connect(Redis(url=SecretStr(url)))
        self.queue = RedisQueue(self.client, Queue())
        self.registry = LeaseRegistry(
            self.queue,
            queue_name=MODEL,
            owner=OWNER,
            ttl_s=600,
            renew_every_s=600,
            status=self._status,
            healthy=lambda: True,
        )
        self.registry.start()
        until(lambda: self.queue.workers(), "the first tick, after which none comes")
        self.listener = CancelListener(self.client, MODEL, self.registry.note_cancel)
        self.listener.start()
        self.await_subscription()

    def await_subscription(self) -> None:
        channel = keys.cancels(MODEL)
        until(lambda: self.client.pubsub_numsub(channel)[0][1] == 1, "subscription")

    def leased(self) -> Lease:
        job = NewJob(tenant="acme", model=MODEL, endpoint="/v1/test", body=b"{}")
        self.queue.enqueue(job)
        self.registry.add(self.queue.claim(MODEL, OWNER))
        return self.registry.start_job(job.id)

    def close(self) -> None:
        self.listener.stop()
        self.registry.stop()
        self.client.connection_pool.disconnect()

    @staticmethod
    def _status() -> WorkerStatus:
        return WorkerStatus(
            owner=OWNER,
            queue=MODEL,
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


@pytest.fixture
def worker(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(leases, "CANCEL_LATENCY_S", 600.0)
    worker = Worker(broker_url)
    yield worker
    worker.close()


def test_a_cancel_comes_without_a_renewal(worker: Worker) -> None:
    mine, other = worker.leased(), worker.leased()
    assert worker.queue.cancel(mine.claim.job.id) == "cancelling"
    assert mine.cancelled.wait(PATIENCE_S)
    assert not mine.lost.is_set()
    assert not other.stopping


def test_a_job_of_another_worker_is_left_alone(worker: Worker) -> None:
    mine = worker.leased()
    other = NewJob(tenant="acme", model=MODEL, endpoint="/v1/test", body=b"{}")
    worker.queue.enqueue(other)
    worker.queue.claim(MODEL, "host:2:b")
    assert worker.queue.cancel(other.id) == "cancelling"
    assert worker.queue.cancel(mine.claim.job.id) == "cancelling"
    assert mine.cancelled.wait(PATIENCE_S)
    assert worker.registry.held == 1


def test_it_listens_again_after_the_connection_was_lost(
    worker: Worker, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.cancels._RETRY_S", 0.01)
    lease = worker.leased()
    with capture_logs() as lines, redis.Redis.from_url(broker_url) as client:
        assert client.client_kill_filter(_type="pubsub") == 1
        until(lambda: "cancel_news_found" in [line["event"] for line in lines], "news again")
    assert [line["event"] for line in lines] == ["cancel_news_lost", "cancel_news_found"]
    assert worker.queue.cancel(lease.claim.job.id) == "cancelling"
    assert lease.cancelled.wait(PATIENCE_S)
