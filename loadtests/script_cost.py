"""What the queue's scripts cost Redis per job, by number of tenants that have jobs waiting.

Read from Redis itself (`INFO commandstats`), so that neither client nor network is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import redis

from broker.jobs import NewJob, Outcome, Status
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests.stack import MODEL

#: Jobs waiting before and while the cost is read; the same for any number of tenants.
BACKLOG = 10_000
#: Jobs whose enqueue, claim and completion are read.
SAMPLE = 2_000
CLAIM = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Microseconds of Redis per job."""

    enqueue_us: float
    claim_us: float
    complete_us: float

    @property
    def total_us(self) -> float:
        return self.enqueue_us + self.claim_us + self.complete_us


class CostProbe:
    """One Redis whose backlog belongs to a fixed number of tenants; `backlog` is added to it."""

    def __init__(
        self, url: str, *, tenants: int, backlog: int = BACKLOG, max_queued: int = 1_000_000
    ) -> None:
        self.tenants = tenants
        self._redis = redis.Redis.from_url(url)
        settings = Queue(default_max_queued=max_queued, max_queued_total=max_queued)
        self._queue = RedisQueue(self._redis, settings)
        self._next = 0
        self.rounds: list[Cost] = []
        for _ in range(backlog):
            self._enqueue()

    def _enqueue(self) -> None:
        tenant = f"tenant-{self._next % self.tenants}"
        self._next += 1
        self._queue.enqueue(
            NewJob(tenant=tenant, model=MODEL, endpoint="/v1/chat/completions", body=b"{}")
        )

    def measure(self) -> Cost:
        """One round: the backlog is as long after it as before."""
        self._reset()
        for _ in range(SAMPLE):
            self._enqueue()
        enqueue_us = self._spent_us() / SAMPLE

        outcome = Outcome(status=Status.COMPLETED, output=b"{}")
        claim_us = complete_us = 0.0
        for _ in range(SAMPLE // CLAIM):
            self._reset()
            claims = self._queue.claim(MODEL, "probe", limit=CLAIM)
            claim_us += self._spent_us()
            self._reset()
            for claim in claims:
                self._queue.complete(claim, outcome)
            complete_us += self._spent_us()
        cost = Cost(
            enqueue_us=enqueue_us, claim_us=claim_us / SAMPLE, complete_us=complete_us / SAMPLE
        )
        self.rounds.append(cost)
        return cost

    def _reset(self) -> None:
        self._redis.config_resetstat()

    def _spent_us(self) -> float:
        """Time inside scripts since the reset; the commands they call are part of it."""
        stats = self._redis.info("commandstats")
        names = ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_fcall")
        return float(sum(stats[name]["usec"] for name in names if name in stats))
