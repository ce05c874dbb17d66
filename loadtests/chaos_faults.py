"""The faults of the chaos run, in an order and at moments drawn from a seed; and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import redis

from broker import keys
from broker.errors import BrokerError
from loadtests.chaos_client import Client
from loadtests.chaos_stack import LEASE_TTL_S, WORKERS, ChaosStack
from loadtests.harness import BenchError, say
from loadtests.lab import Child
from loadtests.stack import MODEL

#: Submits that are under way when an API process is killed.
_BURST = 12
#: Workers that must be ready before one is struck, so that another can take its jobs.
_READY = 2
_READY_S = 30.0
_EXIT_S = 15.0
_TERMINAL = (b"completed", b"failed", b"cancelled", b"expired")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    seed: int
    #: Time the faults are spread over, about.
    seconds: float
    #: Jobs a second.
    rate: float
    worker_kills: int
    api_kills: int
    redis_kills: int
    cuts: int
    demotions: int
    pauses: int
    drains: int
    #: A stack with a replica and a Sentinel; the faults of the single Valkey don't go with it.
    failovers: int = 0

    @property
    def faults(self) -> int:
        struck = self.worker_kills + self.api_kills + self.redis_kills
        return struck + self.cuts + self.demotions + self.pauses + self.drains + self.failovers

    def order(self, chance: random.Random) -> list[str]:
        names = ["worker_kill"] * self.worker_kills + ["api_kill"] * self.api_kills
        names += ["redis_kill"] * self.redis_kills + ["cut"] * self.cuts
        names += ["demotion"] * self.demotions
        names += ["pause"] * self.pauses + ["drain"] * self.drains
        names += ["failover"] * self.failovers
        chance.shuffle(names)
        return names


@dataclass(frozen=True, slots=True)
class _Held:
    """A job that a killed worker held."""

    attempt: int
    killed_at: float
    #: Faults begun so far, to tell whether another one came in between.
    number: int


@dataclass(slots=True)
class Recoveries:
    """Seconds from a worker's death to the next start of each job it held."""

    alone_s: list[float] = field(default_factory=list)
    #: Another fault came in between.
    disturbed_s: list[float] = field(default_factory=list)
    #: Ended without a further start: cancelled, or completed just before the kill.
    ended: int = 0


class Faults:
    """Strikes one after the other; belongs to the main thread's event loop."""

    def __init__(self, plan: Plan, stack: ChaosStack, client: Client) -> None:
        self._plan = plan
        self._stack = stack
        self._client = client
        self._chance = random.Random(plan.seed)
        self._paused: set[int] = set()
        self._wakes: set[asyncio.Task[None]] = set()
        self._open: dict[str, _Held] = {}
        self._begun = 0
        self.done: Counter[str] = Counter()
        self.recoveries = Recoveries()
        #: Exit statuses of drained workers.
        self.drain_statuses: Counter[int] = Counter()
        #: From each death of a primary until its successor has a replica again.
        self.failovers_s: list[float] = []

    async def run(self) -> None:
        names = self._plan.order(self._chance)
        pause_s = self._plan.seconds / len(names)
        for number, name in enumerate(names, 1):
            began = time.monotonic()
            self._begun = number
            await getattr(self, f"_{name}")()
            self.done[name] += 1
            if number % 10 == 0:
                say(f"{number}/{len(names)} faults, {len(self._client.ledger.entries)} jobs")
            spent_s = time.monotonic() - began
            await asyncio.sleep(max(0.0, self._chance.uniform(0, 2 * pause_s) - spent_s))
        while self._wakes:
            await asyncio.wait(self._wakes)

    # -- the faults --------------------------------------------------------------------------------
    async def _worker_kill(self) -> None:
        index = await self._victim()
        pid = self._stack.workers[index].process.pid
        self._stack.workers[index].kill()
        killed_at = time.time()
        self._stack.replace_worker(index)
        for lease in await asyncio.to_thread(self._leases_of, pid):
            self._open[lease[0]] = _Held(attempt=lease[1], killed_at=killed_at, number=self._begun)

    async def _api_kill(self) -> None:
        index = self._chance.randrange(len(self._stack.apis))
        for _ in range(_BURST):
            self._client.new_job()
        await asyncio.sleep(self._chance.uniform(0, 0.04))
        self._stack.kill_api(index)
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        self._stack.start_api(index)
        await self._stack.api_listens(index)

    async def _redis_kill(self) -> None:
        await self._stack.restart_redis(self._chance.uniform(0, 1.5))

    async def _cut(self) -> None:
        await self._stack.cut(self._chance.uniform(0, 1.5))

    async def _demotion(self) -> None:
        # A worker that starts meanwhile ends: a replica's address is a wrong one to it.
        await self._no_starts()
        await self._stack.demote_redis(self._chance.uniform(0.2, 1.5))

    async def _failover(self) -> None:
        began = time.monotonic()
        await self._stack.fail_over(self._chance.uniform(0, 1.5))
        self.failovers_s.append(time.monotonic() - began)

    async def _pause(self) -> None:
        index = await self._victim()
        child = self._stack.workers[index]
        child.pause()
        self._paused.add(index)
        length_s = LEASE_TTL_S + self._chance.uniform(0.3, 2.0)
        self._wakes.add(task := asyncio.create_task(self._wake(child, index, length_s)))
        task.add_done_callback(self._wakes.discard)

    async def _wake(self, child: Child, index: int, length_s: float) -> None:
        await asyncio.sleep(length_s)
        child.resume()
        self._paused.discard(index)

    async def _drain(self) -> None:
        index = await self._victim()
        process = self._stack.workers[index].process
        process.terminate()
        deadline = time.monotonic() + _EXIT_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise BenchError(f"a worker told to end still ran after {_EXIT_S:g} s")
            await asyncio.sleep(0.05)
        self.drain_statuses[process.returncode] += 1
        self._stack.replace_worker(index)

    async def _no_starts(self) -> None:
        """Until every worker that isn't stopped has started."""
        deadline = time.monotonic() + _READY_S
        while True:
            ready = await asyncio.to_thread(self._stack.ready_pids)
            pids = [child.process.pid for child in self._stack.workers]
            if all(pid in ready or index in self._paused for index, pid in enumerate(pids)):
                return
            if time.monotonic() > deadline:
                raise BenchError(f"not all workers ready within {_READY_S:g} s")
            await asyncio.sleep(0.05)

    async def _victim(self) -> int:
        """A worker that is ready, while another one is."""
        deadline = time.monotonic() + _READY_S
        while True:
            for child in self._stack.workers:
                child.check()
            ready = await asyncio.to_thread(self._stack.ready_pids)
            indexes = [
                index
                for index in range(WORKERS)
                if index not in self._paused and self._stack.workers[index].process.pid in ready
            ]
            if len(indexes) >= _READY:
                return self._chance.choice(indexes)
            if time.monotonic() > deadline:
                raise BenchError(f"not {_READY} workers ready within {_READY_S:g} s")
            await asyncio.sleep(0.05)

    # -- recovery ----------------------------------------------------------------------------------
    def _leases_of(self, pid: int) -> list[tuple[str, int]]:
        with contextlib.suppress(BrokerError):
            leases = self._stack.queue.leases(MODEL, limit=1000)
            return [(x.job_id, x.attempt) for x in leases if x.owner.split(":")[1] == str(pid)]
        return []

    async def watch(self) -> None:
        """Look at the jobs of killed workers until each has been started again."""
        while True:
            ids = list(self._open)
            if ids:
                with contextlib.suppress(redis.RedisError):
                    for job_id, row in zip(
                        ids, await asyncio.to_thread(self._records, ids), strict=True
                    ):
                        self._look(job_id, row)
            await asyncio.sleep(0.05)

    def _records(self, ids: list[str]) -> list[list[bytes | None]]:
        with self._stack.client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(keys.job(job_id), "attempt", "started_ms", "status")
            rows: list[list[bytes | None]] = pipe.execute()
        return rows

    def _look(self, job_id: str, row: list[bytes | None]) -> None:
        held = self._open[job_id]
        if int(row[0] or 0) > held.attempt:
            took_s = int(row[1] or 0) / 1000 - held.killed_at
            alone = self._begun == held.number
            (self.recoveries.alone_s if alone else self.recoveries.disturbed_s).append(took_s)
        elif row[2] in _TERMINAL:
            self.recoveries.ended += 1
        else:
            return
        del self._open[job_id]
