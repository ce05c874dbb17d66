"""Random histories on Redis and in memory: same answers, same race, no invariant ever broken.

Time in Redis is its own clock, so each step first sets the deadlines there to those in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker import keys
from broker.drain import Drain
from broker.errors import QueueFullError
from broker.jobs import BANDS, Accepted, Claim, Delta, NewJob, Outcome, Status, Usage
from broker.memory import MemoryQueue
from broker.policies import TenantPolicy
from broker.queue import JobQueue
from broker.redis_queue import RedisQueue
from tests.contract.harness import LEASE_MS, MODEL, ManualClock, new_job
from tests.contract.harness import settings as queue_settings
from tests.contract.invariants import check

TENANTS = st.sampled_from(["a", "b", "c", "ü|x"])
JOBS = st.fixed_dictionaries(
    {
        "tenant": TENANTS,
        "band": st.sampled_from(BANDS),
        "cost": st.integers(1, 2_000),
        "delay_ms": st.sampled_from([0, 0, 0, 5_000]),
        "max_attempts": st.integers(1, 3),
        #: From now on; 0 is without one.
        "deadline_ms": st.sampled_from([0, 0, 2_000, 8_000]),
    }
)
SETTINGS = queue_settings(default_max_queued=8, max_queued_total=20, default_max_in_flight=3)
BASE = f"fb:{{{MODEL}}}:"


class Twins(RuleBasedStateMachine):
    """Does the same to both queues and compares."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.clock = ManualClock()
        self.memory = MemoryQueue(SETTINGS, self.clock)
        self.redis = RedisQueue(self.client, SETTINGS)
        self.ids: list[str] = []
        #: Claims ever made.
        self.claims: list[Claim] = []

    def both(self, call: Any) -> Any:
        self.align()
        outcomes = []
        for queue in (self.redis, self.memory):
            try:
                outcomes.append(call(queue))
            except QueueFullError as error:
                outcomes.append(str(error))
        real, twin = outcomes
        assert real == twin
        return real

    def align(self) -> None:
        seconds, micros = self.client.time()
        offset = seconds * 1000 + micros // 1000 - self.clock.now
        state = self.memory._queues.get(MODEL)
        if state is None:
            return
        for job_id, lease in state.leases.items():
            self.client.zadd(BASE + "l", {job_id: lease.deadline_ms + offset})
        for job_id, due in state.delayed.items():
            self.client.zadd(BASE + "d", {job_id: due + offset})
        for name, drain in state.drains.items():
            field = "d" if name is None else f"d:{name}"
            there = replace(drain, at_ms=drain.at_ms + offset)
            self.client.hset(BASE + "s", field, there.pack())
        for since in state.since.values():
            for job_id, moment in since.items():
                band = self.memory.get(job_id).band
                self.client.zadd(f"{BASE}o:{band}", {job_id: moment + offset})
        for job_id in self.ids:
            since_ms = self.memory._records[job_id].since_ms
            self.client.hset(keys.job(job_id), "queued_ms", since_ms + offset)
            deadline = self.memory.get(job_id).deadline_ms
            if deadline:
                self.client.hset(keys.job(job_id), "deadline_ms", deadline + offset)
                self.client.zadd(BASE + "e", {job_id: deadline + offset}, xx=True)

    @initialize(jobs=st.lists(JOBS, min_size=5, max_size=12))
    def begin(self, jobs: list[dict[str, Any]]) -> None:
        self.enqueue(jobs)

    @rule(jobs=st.lists(JOBS, min_size=1, max_size=4))
    def put_in(self, jobs: list[dict[str, Any]]) -> None:
        self.enqueue(jobs)

    def enqueue(self, jobs: list[dict[str, Any]]) -> None:
        for fields in jobs:
            deadline = fields["deadline_ms"]
            job = new_job(**{**fields, "deadline_ms": deadline and self.clock.now + deadline})
            if isinstance(self.both(partial(_enqueue, job)), Accepted):
                self.ids.append(job.id)

    @rule(limit=st.integers(1, 4), owner=st.sampled_from(["w1", "w2"]))
    def claim(self, limit: int, owner: str) -> None:
        self.align()
        real = self.redis.claim(MODEL, owner, limit=limit)
        twin = self.memory.claim(MODEL, owner, limit=limit)
        assert [(each.job.id, each.attempt) for each in real] == [
            (each.job.id, each.attempt) for each in twin
        ]
        self.claims += real

    @precondition(lambda self: self.claims)
    @rule(
        deed=st.sampled_from(["complete", "complete", "requeue", "bury", "emit", "renew"]),
        stale=st.sampled_from([False, False, False, True]),
        pick=st.integers(0, 50),
        tokens=st.integers(0, 3_000),
        delay=st.sampled_from([0, 5_000]),
        refund=st.booleans(),
    )
    def act(self, deed: str, stale: bool, pick: int, tokens: int, delay: int, refund: bool) -> None:
        """As a worker that holds the lease, or that doesn't know that it has lost it."""
        leases = self.memory._queues[MODEL].leases
        held = [
            claim
            for claim in self.claims
            if claim.job.id in leases and leases[claim.job.id].attempt == claim.attempt
        ]
        among = self.claims if stale or not held else held
        claim = among[pick % len(among)]
        outcome = Outcome(status=Status.COMPLETED, usage=Usage(output_tokens=tokens))
        delta = Delta(job_id=claim.job.id, attempt=claim.attempt, text="x")
        deeds: dict[str, Callable[[JobQueue], Any]] = {
            "complete": lambda queue: queue.complete(claim, outcome),
            "requeue": lambda queue: queue.requeue(claim, delay_ms=delay, refund=refund),
            "bury": lambda queue: queue.bury(claim, "worker_lost", "Lost."),
            "emit": lambda queue: queue.emit(MODEL, [delta]),
            "renew": lambda queue: queue.renew(MODEL, "w1", [(claim.job.id, claim.attempt)]),
        }
        self.both(deeds[deed])

    @precondition(lambda self: self.ids)
    @rule(pick=st.integers(0, 50))
    def cancel(self, pick: int) -> None:
        job_id = self.ids[pick % len(self.ids)]
        self.both(lambda queue: queue.cancel(job_id))

    @rule(
        deed=st.sampled_from(["set", "set", "forget", "release", "sweep", "time"]),
        tenant=TENANTS,
        weight=st.sampled_from([0.3, 1.0, 4.0]),
        cap=st.integers(1, 4),
        milliseconds=st.sampled_from([3_000, LEASE_MS]),
    )
    def look_after(
        self, deed: str, tenant: str, weight: float, cap: int, milliseconds: int
    ) -> None:
        if deed == "set":
            policy = TenantPolicy(weight=weight, max_in_flight=cap, max_queued=7)
            self.both(lambda queue: queue.set_policy(tenant, policy))
        elif deed == "forget":
            self.both(lambda queue: queue.set_policy(tenant, None))
        elif deed == "release":
            self.both(lambda queue: queue.release_owner(MODEL, "w2"))
        elif deed == "sweep":
            self.both(lambda queue: queue.sweep(MODEL))
        else:
            self.clock.now += milliseconds

    @invariant()
    def nothing_is_broken(self) -> None:
        check(self.client, MODEL)

    @invariant()
    def the_race_is_the_same(self) -> None:
        state = self.memory._queues.get(MODEL)
        if state is None:
            return
        kept = {key.decode(): value for key, value in self.client.hgetall(BASE + "s").items()}
        drains = {name: value for name, value in kept.items() if name.split(":")[0] == "d"}
        raw = {name: float(value) for name, value in kept.items() if name not in drains}
        for name, twin_drain in state.drains.items():
            drain = Drain.unpack(drains.pop("d" if name is None else f"d:{name}"))
            assert drain is not None
            assert drain.jobs == pytest.approx(twin_drain.jobs, rel=0.02)
            assert drain.tokens == pytest.approx(twin_drain.tokens, rel=0.02)
            assert drain.busy_ms == pytest.approx(twin_drain.busy_ms, rel=0.02, abs=200)
        assert not drains
        fair = state.fair
        assert (raw.get("taken", 0.0), raw.get("estimated", 0.0)) == (fair.taken, fair.estimated)
        for band, twin in fair.bands.items():
            clock = raw.get(f"V:{band}", 0.0)
            assert clock == twin.clock
            assert raw.get(f"lag:{band}", 0.0) == twin.lag
            assert self.times(f"a:{band}") == twin.active
            assert _ahead(self.times(f"i:{band}"), clock) == _ahead(twin.idle, clock)
        assert {name.decode() for name in self.client.smembers(BASE + "park")} == state.parked

    def times(self, key: str) -> dict[str, float]:
        rows = self.client.zrange(BASE + key, 0, -1, withscores=True)
        return {name.decode(): score for name, score in rows}

    @invariant()
    def readings_are_the_same(self) -> None:
        real, twin = self.redis.stats(MODEL), self.memory.stats(MODEL)
        assert [band.depth for band in real.bands] == [band.depth for band in twin.bands]
        assert (real.delayed, real.in_flight, real.dead) == (
            twin.delayed,
            twin.in_flight,
            twin.dead,
        )
        assert real.top_tenants == twin.top_tenants

    def teardown(self) -> None:
        for job_id in self.ids:
            mine, theirs = self.redis.get(job_id), self.memory.get(job_id)
            assert (mine.status, mine.attempt, mine.seq, mine.error, mine.usage) == (
                theirs.status,
                theirs.attempt,
                theirs.seq,
                theirs.error,
                theirs.usage,
            )
            assert self.redis.events(job_id) == self.memory.events(job_id)
        super().teardown()


def _enqueue(job: NewJob, queue: JobQueue) -> Accepted:
    return queue.enqueue(job)


def _ahead(times: dict[str, float], clock: float) -> dict[str, float]:
    """Entries which the clock has passed mean nothing."""
    return {tenant: time for tenant, time in times.items() if time > clock}


@pytest.mark.timeout(300)
def test_redis_and_memory_agree(broker_url: str) -> None:
    with redis.Redis.from_url(broker_url) as client:
        machine = type("Machine", (Twins,), {"client": client})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
