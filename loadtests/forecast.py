"""How far `queue.estimated_start_ms` is off, with a real worker on the simulated engine.

For each load a worker of 8 slots starts anew, warms up, and jobs are put in: at once, at random
moments, or both. Estimates are read as the API reads them: right after a job was put in, and of
some waiting jobs four times a second. Later the record tells when the job really started. What is
compared is the wait that was foretold with the wait that came, both from the moment of reading.
Waits under half a second are counted apart, in milliseconds: a quotient says little of them.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import redis

from broker.jobs import Band, NewJob
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests.harness import Bar, BenchError, conditions, percentile, report, say, table
from loadtests.lab import SERVER_CORE, Lab, pin_load, python, run, until
from loadtests.stack import MODEL, request_body, worker_env

SLOTS = 8
STEP_MS = 10.0
#: Answers are of 5 to 35 tokens, 200 ms on average: about 40 jobs/s.
TOKENS = (5, 35)
WARM_UP = 80
#: Between two looks at waiting jobs, and jobs looked at.
LOOK_EVERY_S = 0.25
LOOK_AT = 8
#: Waits from here on are judged by the quotient (s).
LONG_S = 0.5
DRAINED_S = 60.0

BARS = (
    Bar(figure="error_p50", relation="at most", limit=0.25),
    Bar(figure="error_p90", relation="at most", limit=1.0),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One tenant's jobs."""

    tenant: str
    band: Band = Band.STANDARD
    #: Put in at the beginning.
    burst: int = 0
    #: Then a second, at random moments.
    rate: float = 0.0
    #: The burst comes this late (s).
    late_s: float = 0.0
    weight: float = 1.0
    cap: int = 1_000


@dataclass(frozen=True, kw_only=True)
class Load:
    name: str
    sources: Sequence[Source]
    seconds: float = 0.0


LOADS = (
    Load(name="400 jobs of one tenant", sources=(Source(tenant="a", burst=400),)),
    Load(
        name="140 each, weights 1:2:4",
        sources=[Source(tenant=f"t{w}", burst=140, weight=w) for w in (1, 2, 4)],
    ),
    Load(
        name="70 % load, three tenants",
        sources=[Source(tenant=name, rate=9.3) for name in "abc"],
        seconds=10,
    ),
    Load(
        name="150 % load, three tenants",
        sources=[Source(tenant=name, rate=20) for name in "abc"],
        seconds=8,
    ),
    Load(
        name="batch 250, interactive 50 %",
        sources=(
            Source(tenant="b", band=Band.BATCH, burst=250),
            Source(tenant="i", band=Band.INTERACTIVE, rate=20),
        ),
        seconds=8,
    ),
    Load(
        name="30 % load, then 250 at once",
        sources=(Source(tenant="a", rate=12), Source(tenant="b", burst=250, late_s=6)),
        seconds=8,
    ),
    Load(
        name="capped at 2 slots, beside another",
        sources=(Source(tenant="c", burst=70, cap=2), Source(tenant="o", burst=250)),
    ),
)


@dataclass(slots=True)
class Guess:
    job_id: str
    read_ms: int
    start_ms: int
    at_submit: bool


@dataclass(slots=True)
class Errors:
    """Of one load."""

    #: Foretold wait less real wait, over the real one.
    relative: list[float] = field(default_factory=list)
    #: The same of short waits, in ms.
    short_ms: list[float] = field(default_factory=list)
    at_submit: list[float] = field(default_factory=list)
    without: int = 0

    def add(self, off_ms: float, real_ms: float, *, at_submit: bool) -> None:
        """Take account of an estimate: how far off, of which real wait."""
        if real_ms < LONG_S * 1000:
            self.short_ms.append(off_ms)
            return
        self.relative.append(off_ms / real_ms)
        if at_submit:
            self.at_submit.append(off_ms / real_ms)


def arrivals(load: Load, dice: random.Random) -> Iterator[tuple[float, Source]]:
    """When jobs come, in seconds from the beginning, in order."""
    found = []
    for source in load.sources:
        found += [(source.late_s, source)] * source.burst
        at = 0.0
        while source.rate and (at := at + dice.expovariate(source.rate)) < load.seconds:
            found.append((at, source))
    # Jobs that come together come mixed.
    dice.shuffle(found)
    return iter(sorted(found, key=lambda each: each[0]))


class Bench:
    def __init__(self, lab: Lab, load: Load, number: int) -> None:
        self._load = load
        self._random = random.Random(number)
        url = lab.redis(name=f"valkey-{number}")
        self._redis = redis.Redis.from_url(url)
        self._queue = RedisQueue(self._redis, Queue())
        for source in load.sources:
            policy = TenantPolicy(
                weight=source.weight, max_in_flight=source.cap, max_queued=100_000
            )
            self._queue.set_policy(source.tenant, policy)
        self._child = lab.start(
            python("workers", "--model", MODEL),
            name=f"worker-{number}",
            core=SERVER_CORE,
            env=worker_env(url, capacity=SLOTS, step_ms=STEP_MS),
        )
        self._ids: list[str] = []
        self._guesses: list[Guess] = []
        self._errors = Errors()

    def run(self) -> Errors:
        warm = Source(tenant="warm", burst=WARM_UP)
        until(self._ready, what="the worker to be ready", child=self._child)
        for _ in range(WARM_UP):
            self._put_in(warm)
        self._drain()
        self._ids.clear()
        self._guesses.clear()
        self._errors.without = 0
        self._feed()
        self._drain()
        self._judge()
        self._child.stop()
        self._redis.close()
        return self._errors

    def _ready(self) -> bool:
        return any(worker.state == "ready" for worker in self._queue.workers())

    def _put_in(self, source: Source) -> None:
        tokens = self._random.randint(*TOKENS)
        job = NewJob(
            tenant=source.tenant,
            model=MODEL,
            endpoint="/v1/chat/completions",
            band=source.band,
            body=json.dumps(request_body(max_tokens=tokens)).encode(),
            cost=tokens,
        )
        self._queue.enqueue(job)
        self._ids.append(job.id)
        self._guess(job.id, at_submit=True)

    def _guess(self, job_id: str, *, at_submit: bool) -> None:
        place = self._queue.position(job_id)
        if place is None:
            return
        if place.estimated_start_ms is None:
            self._errors.without += 1
            return
        self._guesses.append(
            Guess(job_id, time.time_ns() // 1_000_000, place.estimated_start_ms, at_submit)
        )

    def _feed(self) -> None:
        began = look = time.monotonic()
        for at, source in arrivals(self._load, self._random):
            while (now := time.monotonic()) < began + at:
                if now >= look:
                    self._look()
                    look = now + LOOK_EVERY_S
                time.sleep(max(0.0, min(began + at, look) - time.monotonic()))
            self._put_in(source)

    def _look(self) -> None:
        # Of those that have started already nothing is told.
        for job_id in self._random.sample(self._ids, min(LOOK_AT, len(self._ids))):
            self._guess(job_id, at_submit=False)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAINED_S
        while (stats := self._queue.stats(MODEL)).depth or stats.in_flight:
            self._child.check()
            if time.monotonic() > deadline:
                raise BenchError(f"{self._load.name}: not done within {DRAINED_S:g} s")
            self._look()
            time.sleep(LOOK_EVERY_S)

    def _judge(self) -> None:
        started = {each: self._queue.get(each).started_ms for each in self._ids}
        for guess in self._guesses:
            real = started[guess.job_id] - guess.read_ms
            off = guess.start_ms - started[guess.job_id]
            self._errors.add(off, real, at_submit=guess.at_submit)


def row(name: str, errors: Errors) -> list[str]:
    def spread(values: Sequence[float], unit: str, places: str) -> str:
        if not values:
            return "-"
        sizes = [abs(each) for each in values]
        return f"{percentile(sizes, 50):{places}} / {percentile(sizes, 90):{places}}{unit}"

    bias = f"{statistics.median(errors.relative):+.0%}" if errors.relative else "-"
    return [
        name,
        f"{len(errors.relative):,}",
        spread(errors.at_submit, "", ".0%"),
        spread(errors.relative, "", ".0%"),
        bias,
        f"{len(errors.short_ms):,}",
        spread(errors.short_ms, "", ",.0f"),
        f"{errors.without:,}",
    ]


HEADINGS = [
    "load", "guesses", "at submit p50 / p90", "all p50 / p90", "bias", "waits < 0.5 s",
    "off by ms p50 / p90", "no estimate",
]  # fmt: skip


def main() -> int:
    where = conditions("redis")
    found: dict[str, Errors] = {}
    with Lab() as lab:
        pin_load()
        for number, load in enumerate(LOADS):
            found[load.name] = Bench(lab, load, number).run()
            say(" | ".join(row(load.name, found[load.name])))
    print("Estimated starts: |foretold - real wait| over the real wait; bias: signed median")
    print(where, table(HEADINGS, [row(*each) for each in found.items()]), sep="\n\n", end="\n\n")
    return report("forecast", figures(found), BARS)


def figures(found: Mapping[str, Errors]) -> dict[str, float]:
    """Each load counts alike, however many guesses it had."""
    all_ = [[abs(each) for each in errors.relative] for errors in found.values()]
    long = [each for each in all_ if each]
    biases = [statistics.median(errors.relative) for errors in found.values() if errors.relative]
    return {
        "error_p50": statistics.mean(percentile(each, 50) for each in long),
        "error_p90": statistics.mean(percentile(each, 90) for each in long),
        "bias": statistics.mean(biases),
        "guesses": float(sum(map(len, long))),
    }


if __name__ == "__main__":
    run(main)
