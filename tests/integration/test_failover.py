"""The primary dies and a replica takes its place: who notices, what survives, and what doesn't."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.connections import check_server, connect
from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.jobs import NewJob
from broker.redis_queue import RedisQueue
from config.settings import Queue, Redis
from tests.integration.sentinel_lab import Cluster
from tests.integration.worker_lab import QUEUE, Lab, until


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def _job() -> NewJob:
    return NewJob(tenant="acme", model=QUEUE, endpoint="/v1/test", body=b"{}")


def _confirmed(careful: RedisQueue) -> NewJob:
    """A job its replica has; one try may fall into a stall of the replica's disk."""
    jobs: list[NewJob] = []

    def accepted() -> bool:
        jobs.append(_job())
        try:
            careful.enqueue(jobs[-1])
        except BrokerUnavailableError:
            return False
        return True

    until(accepted, "a replica confirms a job")
    return jobs[-1]


def test_workers_and_submits_follow_the_primary(cluster: Cluster, tmp_path: Path) -> None:
    """With a replica awaited, every accepted job ends once, and the outage is told of once."""
    lab = Lab(cluster.url, tmp_path, ttl_s=10.0)
    client = connect(Redis(url=SecretStr(cluster.url), timeout_s=1.0))
    queue = RedisQueue(client, Queue(await_replicas=1))
    try:
        check_server(client)
        lab.start(concurrency=4)
        accepted: list[str] = []
        refused = 0

        def submit() -> bool:
            nonlocal refused
            job = NewJob(tenant="acme", model=QUEUE, endpoint="/v1/test", body=b'{"sleep_s":0.05}')
            try:
                queue.enqueue(job)
            except BrokerUnavailableError:
                refused += 1
                return False
            accepted.append(job.id)
            return True

        until(lambda: submit() and len(lab.starts()) >= 10, "jobs run")
        cluster.primary.kill()
        assert not submit()
        until(lambda: cluster.replica.role == "master", "the replica takes over")
        cluster.primary.start(replica_of=cluster.replica)
        recovery_s = until(submit, "a job is accepted again")
        until(lambda: submit() and len(accepted) >= 60, "more jobs are")
        lab.await_end(accepted)
        assert recovery_s < 20
        for job_id in accepted:
            events, _ = lab.queue.events(job_id)
            assert [event.type.is_terminal for event in events].count(True) == 1
        assert lab.workers[0].poll() is None
        events = [line["event"] for line in lab.log()]
        assert events.count("broker_unreachable") <= 1
        assert (events.count("broker_lost"), events.count("broker_found")) in {(1, 1), (0, 0)}
        assert len(events) < 60 + 2 * len(accepted)
    finally:
        client.close()
        lab.close()


def test_what_no_replica_had_is_lost_and_what_narrows_that(cluster: Cluster) -> None:
    client = connect(Redis(url=SecretStr(cluster.url), timeout_s=1.0))
    trusting = RedisQueue(client, Queue())
    careful = RedisQueue(client, Queue(await_replicas=1))
    primary = cluster.primary.client
    try:
        safe = _confirmed(careful)
        primary.config_set("min-replicas-to-write", 0)
        primary.execute_command("ACL", "DELUSER", "replicator")  # cuts replication off

        lost = _job()
        trusting.enqueue(lost)
        unsure = _job()
        with pytest.raises(BrokerUnavailableError, match="too few replicas"):
            careful.enqueue(unsure)
        assert trusting.get(unsure.id).id == unsure.id  # it may still run

        primary.config_set("min-replicas-max-lag", 1)
        primary.config_set("min-replicas-to-write", 1)
        refused = _job()

        def refuses() -> bool:
            try:
                trusting.enqueue(refused)
            except BrokerUnavailableError as error:
                return "NOREPLICAS" in str(error)
            return False

        until(refuses, "a primary without replicas refuses writes")
        cluster.primary.kill()

        def found() -> bool:
            try:
                return trusting.get(safe.id).id == safe.id
            except BrokerUnavailableError:
                return False

        until(found, "the replica takes over")
        for job in (lost, unsure, refused):
            with pytest.raises(JobNotFoundError):
                trusting.get(job.id)
    finally:
        client.close()


def test_a_demoted_primary_is_left_at_once(cluster: Cluster) -> None:
    """Its connections stay open and refuse writes; the call finds the new primary by itself."""
    client = connect(Redis(url=SecretStr(cluster.url), timeout_s=1.0))
    queue = RedisQueue(client, Queue())
    try:
        queue.enqueue(_job())
        cluster.swap()
        begun = time.monotonic()
        job = _job()
        queue.enqueue(job)
        assert time.monotonic() - begun < 10
        assert cluster.replica.client.exists(f"fb:job:{job.id}")
    finally:
        client.close()
