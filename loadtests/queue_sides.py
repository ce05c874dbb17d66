"""The two sides of `loadtests.queue_bench`: a worker, its queue, and how both are filled and read.

A worker is paused (SIGSTOP) while its queue is filled, so that only its own work is measured; both
sides are read by the same cheap poll of their Redis.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

import celery
import redis
from redis.client import Pipeline

from broker.jobs import BANDS, Band, Job, NewJob, Status
from broker.keys import base
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests.harness import BenchError
from loadtests.lab import SERVER_CORE, Child, Lab, python, until
from loadtests.stack import MODEL, request_body, worker_env

THREADS = 8
#: Tenants of the newcomer's run.
FIRST, SECOND = "hoarder", "newcomer"


class Side(Protocol):
    label: str
    child: Child

    def fill(self, jobs: int, *, tenant: str = FIRST) -> list[str]:
        """Enqueue; the ids in order."""
        ...

    def left(self) -> int:
        """Jobs waiting or running."""
        ...

    def finished(self, ids: Sequence[str]) -> None:
        """Raises `BenchError` unless each job has ended well."""
        ...

    def ended(self, ids: Sequence[str]) -> bool:
        """True when each of them, results being stored, is done."""
        ...

    def waits_ms(self, ids: Sequence[str]) -> list[float]:
        """Time from enqueue to start of finished jobs."""
        ...


class Stock:
    """Celery, threads pool, all defaults."""

    def __init__(self, lab: Lab, *, results: bool, nap_ms: float = 0.0) -> None:
        kind = "results in Redis" if results else "results ignored"
        self.label = f"stock Celery, {kind}"
        self._results = results
        self._nap_ms = nap_ms
        name = f"stock-{'results' if results else 'ignored'}-{nap_ms:g}"
        url = lab.redis(name=f"valkey-{name}")
        self._redis = redis.Redis.from_url(url)
        self._app = celery.Celery("producer", broker=url, set_as_current=False)
        self._sent_at: dict[str, float] = {}
        options = ["--pool", "threads", "--concurrency", str(THREADS), "--loglevel", "error"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self.child = lab.start(
            python("celery", "-A", "loadtests.baseline_celery", "worker", *options, *quiet),
            name=name,
            core=SERVER_CORE,
            env={"BASELINE_REDIS": url, "BASELINE_RESULTS": "1" if results else "0"},
        )
        self.fill(1)
        until(lambda: self.left() == 0, what=f"{self.label} to work", child=self.child)

    def fill(self, jobs: int, *, tenant: str = FIRST) -> list[str]:
        name, args = ("nap", [self._nap_ms]) if self._nap_ms else ("noop", [request_body()])
        sent = []
        with self._app.producer_pool.acquire(block=True) as producer:
            for _ in range(jobs):
                result = self._app.send_task(
                    name, args=args, producer=producer, ignore_result=not self._results
                )
                sent.append(result.id)
                self._sent_at[result.id] = time.time()
        return sent

    def left(self) -> int:
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.llen("celery")
            pipe.hlen("unacked")
            return sum(pipe.execute())

    def finished(self, ids: Sequence[str]) -> None:
        if not self._results:
            return  # nothing is left to look at: that is what this variant saves
        states = [result["status"] for result in self._stored(ids)]
        if set(states) != {"SUCCESS"}:
            raise BenchError(f"{self.label}: jobs ended as {set(states)}")

    def ended(self, ids: Sequence[str]) -> bool:
        return self._redis.exists(*_result_keys(ids)) == len(ids)

    def began_ms(self, ids: Sequence[str]) -> list[float]:
        """When naps began (Unix milliseconds)."""
        return [result["result"] * 1000 for result in self._stored(ids)]

    def waits_ms(self, ids: Sequence[str]) -> list[float]:
        pairs = zip(self.began_ms(ids), ids, strict=True)
        return [start - self._sent_at[task_id] * 1000 for start, task_id in pairs]

    def _stored(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Results; the last jobs may still be storing theirs, since stock acks before it runs."""
        until(lambda: self.ended(ids), what=f"results of {self.label}")
        return [json.loads(raw or b"") for raw in self._redis.mget(_result_keys(ids))]


def _result_keys(ids: Sequence[str]) -> list[str]:
    return [f"celery-task-meta-{task_id}" for task_id in ids]


class Forebay:
    """Our worker on our transport with the simulated engine; the whole life of a job is run."""

    def __init__(self, lab: Lab, *, step_ms: float = 0.0, broker_url: str = "") -> None:
        self.label = "Forebay, tickets over RabbitMQ" if broker_url else "Forebay"
        name = f"forebay-{step_ms:g}{'-tickets' if broker_url else ''}"
        url = lab.redis(name=f"valkey-{name}")
        self._redis = redis.Redis.from_url(url)
        self._queue = RedisQueue(self._redis, Queue())
        for tenant in (FIRST, SECOND):
            policy = TenantPolicy(max_in_flight=1_000, max_queued=1_000_000)
            self._queue.set_policy(tenant, policy)
        self.child = lab.start(
            python("workers", "--model", MODEL),
            name=name,
            core=SERVER_CORE,
            env={
                **worker_env(url, capacity=THREADS, step_ms=step_ms),
                "FOREBAY_QUEUE__BROKER_URL": broker_url,
            },
        )
        self.fill(1)
        until(lambda: self.left() == 0, what=f"{self.label} to work", child=self.child)

    def fill(self, jobs: int, *, tenant: str = FIRST) -> list[str]:
        body = json.dumps(request_body()).encode()
        new = [
            NewJob(
                tenant=tenant,
                model=MODEL,
                endpoint="/v1/chat/completions",
                band=Band.STANDARD,
                body=body,
            )
            for _ in range(jobs)
        ]
        for job in new:
            self._queue.enqueue(job)
        return [job.id for job in new]

    def left(self) -> int:
        with self._redis.pipeline(transaction=True) as pipe:
            for band in BANDS:
                pipe.zcard(f"{base(MODEL)}o:{band}")
            pipe.zcard(f"{base(MODEL)}l")
            return sum(pipe.execute())

    def finished(self, ids: Sequence[str]) -> None:
        states = {job.status for job in self._records(ids)}
        if states != {Status.COMPLETED}:
            raise BenchError(f"{self.label}: jobs ended as {states}")

    def ended(self, ids: Sequence[str]) -> bool:
        return all(job.is_terminal for job in self._records(ids))

    def waits_ms(self, ids: Sequence[str]) -> list[float]:
        return [float(job.started_ms - job.created_ms) for job in self._records(ids)]

    def _records(self, ids: Sequence[str]) -> list[Job]:
        with self._redis.pipeline(transaction=False) as pipe:
            _read_all(pipe, ids)
            raw = pipe.execute()
        return [Job.from_hash(job_id, record) for job_id, record in zip(ids, raw, strict=True)]


def _read_all(pipe: Pipeline, ids: Sequence[str]) -> None:
    for job_id in ids:
        pipe.hgetall(f"fb:job:{job_id}")
