"""Random histories on Redis and in memory: same answers, same race, no invariant ever broken.

Time in Redis is its own clock, so each step first sets the deadlines there to those in memory.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from broker.errors import QueueFullError
from broker.jobs import BANDS, Band, Claim, Delta, Outcome, Status, Usage
from broker.memory import MemoryQueue
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from tests.contract.harness import LEASE_MS, MODEL, ManualClock, new_job
from tests.contract.harness import settings as queue_settings
from tests.contract.invariants import check

TENANTS = st.sampled_from(["a", "b", "c", "ü|x"])
SETTINGS = queue_settings(default_max_queued=6, max_queued_total=14, default_max_in_flight=3)
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
        #: Claims ever made, with that of the twin.
        self.claims: list[tuple[Claim, Claim]] = []

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

    @rule(
        tenant=TENANTS,
        band=st.sampled_from(BANDS),
        cost=st.integers(1, 2_000),
        delay=st.sampled_from([0, 0, 0, 5_000]),
        attempts=st.integers(1, 3),
    )
    def enqueue(self, tenant: str, band: Band, cost: int, delay: int, attempts: int) -> None:
        job = new_job(tenant, band=band, cost=cost, delay_ms=delay, max_attempts=attempts)
        answer = self.both(lambda queue: queue.enqueue(job))
        if isinstance(answer, int):
            self.ids.append(job.id)

    @rule(limit=st.integers(1, 4), owner=st.sampled_from(["w1", "w2"]))
    def claim(self, limit: int, owner: str) -> None:
        self.align()
        real = self.redis.claim(MODEL, owner, limit=limit)
        twin = self.memory.claim(MODEL, owner, limit=limit)
        assert [(each.job.id, each.attempt) for each in real] == [
            (each.job.id, each.attempt) for each in twin
        ]
        self.claims += zip(real, twin, strict=True)

    def of_some_claim(self, pick: int, call: Any) -> None:
        if self.claims:
            real, _ = self.claims[pick % len(self.claims)]
            self.both(lambda queue: call(queue, real))

    @rule(pick=st.integers(0, 50), tokens=st.integers(0, 3_000))
    def complete(self, pick: int, tokens: int) -> None:
        outcome = Outcome(status=Status.COMPLETED, usage=Usage(output_tokens=tokens))
        self.of_some_claim(pick, lambda queue, claim: queue.complete(claim, outcome))

    @rule(pick=st.integers(0, 50), delay=st.sampled_from([0, 5_000]), refund=st.booleans())
    def requeue(self, pick: int, delay: int, refund: bool) -> None:
        self.of_some_claim(
            pick, lambda queue, claim: queue.requeue(claim, delay_ms=delay, refund=refund)
        )

    @rule(pick=st.integers(0, 50))
    def bury(self, pick: int) -> None:
        self.of_some_claim(pick, lambda queue, claim: queue.bury(claim, "worker_lost", "Lost."))

    @rule(pick=st.integers(0, 50))
    def emit(self, pick: int) -> None:
        self.of_some_claim(
            pick,
            lambda queue, claim: queue.emit(
                MODEL, [Delta(job_id=claim.job.id, attempt=claim.attempt, text="x")]
            ),
        )

    @rule(pick=st.integers(0, 50), owner=st.sampled_from(["w1", "w2"]))
    def renew(self, pick: int, owner: str) -> None:
        self.of_some_claim(
            pick, lambda queue, claim: queue.renew(MODEL, owner, [(claim.job.id, claim.attempt)])
        )

    @rule(pick=st.integers(0, 50))
    def cancel(self, pick: int) -> None:
        if self.ids:
            job_id = self.ids[pick % len(self.ids)]
            self.both(lambda queue: queue.cancel(job_id))

    @rule(owner=st.sampled_from(["w1", "w2"]))
    def release_owner(self, owner: str) -> None:
        self.both(lambda queue: queue.release_owner(MODEL, owner))

    @rule(
        tenant=TENANTS,
        weight=st.sampled_from([0.3, 1.0, 4.0]),
        cap=st.integers(1, 4),
        bound=st.integers(1, 8),
    )
    def set_policy(self, tenant: str, weight: float, cap: int, bound: int) -> None:
        policy = TenantPolicy(weight=weight, max_in_flight=cap, max_queued=bound)
        self.both(lambda queue: queue.set_policy(tenant, policy))

    @rule(tenant=TENANTS)
    def forget_policy(self, tenant: str) -> None:
        self.both(lambda queue: queue.set_policy(tenant, None))

    @rule()
    def sweep(self) -> None:
        self.both(lambda queue: queue.sweep(MODEL))

    @rule(milliseconds=st.sampled_from([3_000, LEASE_MS]))
    def pass_time(self, milliseconds: int) -> None:
        self.clock.now += milliseconds

    @invariant()
    def nothing_is_broken(self) -> None:
        check(self.client, MODEL)

    @invariant()
    def the_race_is_the_same(self) -> None:
        state = self.memory._queues.get(MODEL)
        if state is None:
            return
        raw = {key.decode(): float(value) for key, value in self.client.hgetall(BASE + "s").items()}
        for band, twin in state.fair.bands.items():
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
