"""What a job costs Redis with many tenants and a long queue, and what a second primary gives.

Costs are read from Redis itself (`INFO commandstats`), so that neither client nor network is in
them. `FOREBAY_BENCH_QUEUED` sets the length of the long queue.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence

import psutil
import redis

from broker.jobs import NewJob, Outcome, Status
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests.batching import Filler
from loadtests.cells import cell_of, imbalance, moved
from loadtests.harness import Bar, BenchError, conditions, median_ratio, report, say, table
from loadtests.lab import Lab, pin_load, run
from loadtests.script_cost import BACKLOG, CLAIM, Cost, CostProbe
from loadtests.stack import MODEL

ROUNDS = 5
TENANTS = (1, 100, 10_000)
MANY = TENANTS[-1]

QUEUED = int(os.environ.get("FOREBAY_BENCH_QUEUED", "1000000"))
#: The long queue is cut off where it is after this time, or when memory gets short.
FILL_S = 240.0
MEMORY_LEFT = 2 * 2**30
#: About what a chat of a few sentences takes.
BODY = b'{"messages":[{"content":"' + b"x" * 360 + b'","role":"user"}],"max_tokens":256}'

CELLS = ("cell-a", "cell-b")
CELL_JOBS = 6_000

BARS = (Bar(figure="tenants_10k_ratio", relation="at most", limit=1.5),)


def tenants(lab: Lab) -> tuple[dict[str, float], list[list[str]]]:
    """A job's cost by the number of tenants that wait, the queue being equally long."""
    probes = [CostProbe(lab.redis(name=f"valkey-{count}"), tenants=count) for count in TENANTS]
    for number in range(ROUNDS):
        for probe in reversed(probes) if number % 2 else probes:
            cost = probe.measure()
            say(f"{probe.tenants:,} tenants: {cost.total_us:.1f} µs a job")
    one, many = probes[0].rounds, probes[-1].rounds
    figures = {
        "tenants_10k_ratio": median_ratio(
            [cost.total_us for cost in many], [cost.total_us for cost in one]
        ),
        "jobs_per_redis_core": 1e6 / statistics.median(cost.total_us for cost in many),
    }
    return figures, [_row(probe.tenants, BACKLOG, probe.rounds) for probe in probes]


def _row(count: int, queued: int, rounds: Sequence[Cost]) -> list[str]:
    parts = [
        statistics.median(getattr(cost, part) for cost in rounds)
        for part in ("enqueue_us", "claim_us", "complete_us", "total_us")
    ]
    shown = [f"{part:.1f}" for part in parts]
    return [f"{count:,}", f"{queued:,}", *shown, f"{1e6 / parts[-1]:,.0f}"]


def long_queue(lab: Lab) -> tuple[dict[str, float], list[list[str]]]:
    """A job's cost in a very long queue, and the memory each waiting job takes."""
    url = lab.redis(name="valkey-long")
    client = redis.Redis.from_url(url)
    settings = Queue(default_max_queued=10 * QUEUED, max_queued_total=10 * QUEUED)
    RedisQueue(client, settings).load_scripts()
    before = client.info("memory")["used_memory"]
    queued = _fill(Filler(client, settings), QUEUED)
    size = (client.info("memory")["used_memory"] - before) / queued
    probe = CostProbe(url, tenants=MANY, backlog=0, max_queued=10 * QUEUED)
    for _ in range(ROUNDS):
        say(f"{queued:,} queued jobs: {probe.measure().total_us:.1f} µs a job")
    figures = {
        "bytes_per_queued_job": size,
        "queued_jobs": float(queued),
        "long_queue_us": statistics.median(cost.total_us for cost in probe.rounds),
    }
    return figures, [_row(MANY, queued, probe.rounds)]


def _fill(filler: Filler, jobs: int) -> int:
    """Put jobs in until there are enough, time is up or memory is short; how many."""
    began = time.monotonic()
    numbers = iter(range(jobs))
    put = 0
    while batch := list(itertools.islice(numbers, 10_000)):
        filler.put(_job(f"tenant-{number % MANY}") for number in batch)
        put += len(batch)
        if put % 100_000 == 0:
            say(f"{put:,} jobs queued")
        if time.monotonic() - began > FILL_S:
            say(f"time is up: {put:,} of {jobs:,} jobs queued")
            break
        if psutil.virtual_memory().available < MEMORY_LEFT:
            say(f"memory is short: {put:,} of {jobs:,} jobs queued")
            break
    return put


def _job(tenant: str) -> NewJob:
    return NewJob(tenant=tenant, model=MODEL, endpoint="/v1/chat/completions", body=BODY)


class Cell:
    """One primary of its own."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)
        settings = Queue(default_max_queued=1_000_000)
        self._queue = RedisQueue(self._redis, settings)
        self._queue.load_scripts()
        self._filler = Filler(self._redis, settings)
        self.cpu_us: list[float] = []

    def measure(self, names: Sequence[str]) -> None:
        """Run one job for each name to its end; CPU time of the whole server per job."""
        before = self._cpu_s()
        self._filler.put(_job(name) for name in names)
        outcome = Outcome(status=Status.COMPLETED, output=b"{}")
        done = 0
        while claims := self._queue.claim(MODEL, "bench", limit=CLAIM):
            for claim in claims:
                self._queue.complete(claim, outcome)
            done += len(claims)
        if done != len(names):
            raise BenchError(f"{done} of {len(names)} jobs were done")
        self.cpu_us.append((self._cpu_s() - before) / done * 1e6)

    def _cpu_s(self) -> float:
        used = self._redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])


def cells(lab: Lab) -> tuple[dict[str, float], str]:
    """The same tenants on one primary and hashed on two: server CPU per job, and the balance.

    Wall-clock throughput of two servers and their clients would measure this machine's cores.
    """
    single = Cell(lab.redis(name="valkey-single", core=0))
    pair = {name: Cell(lab.redis(name=f"valkey-{name}", core=0)) for name in CELLS}
    names = [f"tenant-{number % MANY}" for number in range(CELL_JOBS)]
    for number in range(ROUNDS):
        single.measure(names)
        for cell, server in pair.items():
            server.measure([name for name in names if cell_of(name, CELLS) == cell])
        shown = ", ".join(f"{server.cpu_us[-1]:.0f}" for server in pair.values())
        say(f"cells round {number + 1}/{ROUNDS}: {single.cpu_us[-1]:.0f} µs; {shown} µs")
    even = {f"tenant-{number}": 1.0 for number in range(MANY)}
    skewed = {f"tenant-{number}": 1.0 / (number + 1) for number in range(MANY)}
    fullest = imbalance(even, CELLS)
    cost = median_ratio(
        [max(each) for each in zip(*(server.cpu_us for server in pair.values()), strict=True)],
        single.cpu_us,
    )
    alone = 1e6 / statistics.median(single.cpu_us)
    gain = len(CELLS) / fullest / cost
    rows = [
        ["one", f"{statistics.median(single.cpu_us):.0f}", f"{alone:,.0f}", "1.00", "1.00"],
        [
            "two, tenants hashed",
            " / ".join(f"{statistics.median(server.cpu_us):.0f}" for server in pair.values()),
            f"{alone * gain:,.0f}",
            f"{gain:.2f}",
            f"{fullest:.3f} (Zipf: {imbalance(skewed, CELLS):.2f})",
        ],
    ]
    elsewhere = moved(list(even), CELLS, (*CELLS, "cell-c"))
    note = f"A third cell moves {elsewhere:.1%} of the tenants."
    headings = ["primaries", "server CPU µs a job", "jobs/s by CPU", "x one", "fullest over mean"]
    return {"two_cells_gain": gain}, f"{table(headings, rows)}\n\n{note}"


def main() -> int:
    where = conditions("redis")
    with Lab() as lab:
        pin_load()
        figures, rows = tenants(lab)
        found, more = long_queue(lab)
        figures |= found
        more_figures, shown = cells(lab)
        figures |= more_figures
    headings = ["tenants waiting", "jobs queued", "enqueue µs", "claim µs", "complete µs"]
    headings += ["a job's life µs", "jobs/s of a Redis core"]
    size = f"{figures['bytes_per_queued_job']:,.0f} bytes of Redis memory per queued job, of which"
    print("Scale: time inside Redis per job, one Valkey without persistence")
    print(where, table(headings, [*rows, *more]), sep="\n\n", end="\n\n")
    print(f"{size} {len(BODY)} are its request body", shown, sep="\n\n", end="\n\n")
    return report("scale", figures, BARS)


if __name__ == "__main__":
    run(main)
