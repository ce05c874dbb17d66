"""A real worker with the simulated engine, fed by several tenants: what concerns time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence

import redis

from broker.jobs import BANDS, Band, Job, NewJob, Status
from broker.keys import base, job
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests.batching import Filler
from loadtests.harness import BenchError
from loadtests.lab import SERVER_CORE, Lab, python, until
from loadtests.stack import MODEL, request_body, worker_env


class LiveWorker:
    """One worker process, its Valkey, and a client of both."""

    def __init__(
        self, lab: Lab, policies: Mapping[str, TenantPolicy], *, slots: int, step_ms: float
    ) -> None:
        name = f"live-{slots}-{step_ms:g}"
        url = lab.redis(name=f"valkey-{name}")
        self._redis = redis.Redis.from_url(url)
        settings = Queue()
        self.queue = RedisQueue(self._redis, settings)
        self.queue.load_scripts()
        self._filler = Filler(self._redis, settings)
        for tenant, policy in policies.items():
            self.queue.set_policy(tenant, policy)
        self.child = lab.start(
            python("workers", "--model", MODEL),
            name=name,
            core=SERVER_CORE,
            env=worker_env(url, capacity=slots, step_ms=step_ms),
        )
        self.wait_for(self.put(next(iter(policies)), 1, answer=1))

    def put(self, tenant: str, jobs: int, *, answer: int, band: Band = Band.STANDARD) -> list[str]:
        return self.put_each([tenant] * jobs, answers=[answer], band=band)

    def put_each(
        self, tenants: Sequence[str], *, answers: Sequence[int], band: Band = Band.STANDARD
    ) -> list[str]:
        """One job for each name, in this order; lengths of answers are taken in turn."""
        new = []
        for number, tenant in enumerate(tenants):
            answer = answers[number % len(answers)]
            new.append(
                NewJob(
                    tenant=tenant,
                    model=MODEL,
                    endpoint="/v1/chat/completions",
                    band=band,
                    cost=answer + 1,
                    body=json.dumps(request_body(max_tokens=answer)).encode(),
                )
            )
        self._filler.put(new)
        return [each.id for each in new]

    def left(self) -> int:
        with self._redis.pipeline(transaction=True) as pipe:
            for band in BANDS:
                pipe.zcard(f"{base(MODEL)}o:{band}")
            pipe.zcard(f"{base(MODEL)}l")
            return int(sum(pipe.execute()))

    def records(self, ids: Sequence[str]) -> list[Job]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(job(job_id))
            raw = pipe.execute()
        return [Job.from_hash(job_id, each) for job_id, each in zip(ids, raw, strict=True)]

    def wait_for(self, ids: Sequence[str], *, timeout_s: float = 60.0) -> list[Job]:
        """The records once all are terminal; raises `BenchError` unless all are completed."""
        until(
            lambda: self.records(ids[-1:])[0].is_terminal,
            what="the last job",
            child=self.child,
            timeout_s=timeout_s,
        )
        until(
            lambda: all(each.is_terminal for each in self.records(ids)),
            what="all jobs",
            child=self.child,
            timeout_s=timeout_s,
        )
        found = self.records(ids)
        states = {each.status for each in found}
        if states != {Status.COMPLETED}:
            raise BenchError(f"jobs ended as {states}")
        return found

    def clear(self, ids: Sequence[str]) -> None:
        """Cancel and wait until the worker is idle."""
        self.queue.cancel_many(ids)
        until(lambda: self.left() == 0, what="an idle worker", child=self.child)

    def arrivals(
        self, tenant: str, *, per_s: float, seconds: float, answer: int, seed: int
    ) -> list[str]:
        """Interactive jobs at random moments (Poisson); the ids."""
        draw = random.Random(seed)
        ids = []
        due = time.monotonic()
        end = due + seconds
        while (due := due + draw.expovariate(per_s)) < end:
            time.sleep(max(0.0, due - time.monotonic()))
            ids += self.put(tenant, 1, answer=answer, band=Band.INTERACTIVE)
        return ids
