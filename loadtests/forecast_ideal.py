"""The loads of `loadtests.forecast` on a machine that never falters.

The queue in memory, and a worker that is only a clock: it moves from event to event, so that
nothing depends on what else the machine does. What is off here is the estimate's own fault, or
can't be known: later arrivals.
"""

from __future__ import annotations

import heapq
import random
import sys

from broker.jobs import Band, Claim, NewJob, Outcome, Status, Usage
from broker.memory import MemoryQueue
from broker.policies import TenantPolicy
from config.settings import Queue
from loadtests.forecast import (
    HEADINGS,
    LOADS,
    LOOK_AT,
    LOOK_EVERY_S,
    SLOTS,
    STEP_MS,
    TOKENS,
    WARM_UP,
    Errors,
    Load,
    Source,
    arrivals,
    figures,
    row,
)
from loadtests.harness import table
from loadtests.stack import MODEL

#: Slots that batch jobs may fill.
BATCH_SLOTS = int(SLOTS * Queue().batch_slots)
#: Of each job, beside those it generates.
PROMPT_TOKENS = 5
#: Between two jobs of a slot (ms).
GAP_MS = (2, 12)


class IdealBench:
    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._random = random.Random(number)
        self._now = 1_000_000.0
        self._queue = MemoryQueue(Queue(), clock_ms=lambda: int(self._now))
        for source in load.sources:
            policy = TenantPolicy(
                weight=source.weight, max_in_flight=source.cap, max_queued=100_000
            )
            self._queue.set_policy(source.tenant, policy)
        #: What runs, by when it ends.
        self._ends: list[tuple[float, str, Claim]] = []
        self._tokens: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._ids: list[str] = []
        #: Job, when it was read, what was foretold, at submit.
        self._guesses: list[tuple[str, float, int, bool]] = []
        self._errors = Errors()

    def run(self) -> Errors:
        for _ in range(WARM_UP):
            self._put_in(Source(tenant="warm"))
        self._drain()
        self._ids.clear()
        self._guesses.clear()
        self._errors.without = 0
        began = look = self._now
        for at, source in arrivals(self._load, self._random):
            while look < began + at * 1000:
                self._pass_until(look)
                self._look()
                look += LOOK_EVERY_S * 1000
            self._pass_until(began + at * 1000)
            self._put_in(source)
        self._drain()
        for job_id, read, foretold, at_submit in self._guesses:
            started = self._started[job_id]
            self._errors.add(foretold - started, started - read, at_submit=at_submit)
        return self._errors

    def _put_in(self, source: Source) -> None:
        tokens = self._random.randint(*TOKENS)
        job = NewJob(
            tenant=source.tenant,
            model=MODEL,
            endpoint="/v1/chat/completions",
            band=source.band,
            body=b"{}",
            cost=tokens,
        )
        self._tokens[job.id] = tokens
        self._queue.enqueue(job)
        self._ids.append(job.id)
        self._guess(job.id, at_submit=True)
        self._claim()

    def _claim(self) -> None:
        room = BATCH_SLOTS - sum(claim.job.band is Band.BATCH for _, _, claim in self._ends)
        free = SLOTS - len(self._ends)
        for claim in self._queue.claim(MODEL, "w", limit=free, batch_room=room) if free else ():
            job_id = claim.job.id
            self._started[job_id] = self._now
            lasts = self._tokens[job_id] * STEP_MS + self._random.uniform(*GAP_MS)
            heapq.heappush(self._ends, (self._now + lasts, job_id, claim))

    def _pass_until(self, moment: float) -> None:
        while self._ends and self._ends[0][0] <= moment:
            self._now, job_id, claim = heapq.heappop(self._ends)
            usage = Usage(input_tokens=PROMPT_TOKENS, output_tokens=self._tokens[job_id])
            self._queue.complete(claim, Outcome(status=Status.COMPLETED, usage=usage))
            self._claim()
        self._now = max(self._now, moment)

    def _drain(self) -> None:
        while self._ends:
            self._look()
            self._pass_until(self._now + LOOK_EVERY_S * 1000)

    def _look(self) -> None:
        for job_id in self._random.sample(self._ids, min(LOOK_AT, len(self._ids))):
            self._guess(job_id, at_submit=False)

    def _guess(self, job_id: str, *, at_submit: bool) -> None:
        place = self._queue.position(job_id)
        if place is None:
            return
        if place.estimated_start_ms is None:
            self._errors.without += 1
            return
        self._guesses.append((job_id, self._now, place.estimated_start_ms, at_submit))


def measure() -> dict[str, Errors]:
    return {load.name: IdealBench(load, number).run() for number, load in enumerate(LOADS)}


def main() -> int:
    found = measure()
    print(table(HEADINGS, [row(*each) for each in found.items()]), figures(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
