"""Whether a worker's memory stays flat: 20,000 mixed jobs on real models, a tenth cancelled.

`forebay up` with the shipped models; chats and completions of many shapes (greedy, sampled, seeded,
penalised, streamed, long and short prompts) and embeddings, so many at once that batches are full.
Read is the resident size of each model's worker, which includes what the allocator keeps. The
first jobs fill caches and pools; judged is the rest, last part over first part.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil

from api.client import AsyncClient
from loadtests.harness import Bar, BenchError, conditions, report, say, table
from loadtests.lab import Child, Lab, python, run
from loadtests.stack import MODEL

JOBS = 20_000
#: Jobs under way at once: more than a batch holds.
AT_ONCE = 96
#: Part of the jobs after which a worker's size is judged.
SETTLED = 0.3
CANCELLED = 0.1
EMBEDDING_MODEL = "all-minilm-l6-v2"
SAMPLE_EVERY_S = 1.0
JOB_S = 120.0
SEED = 20_261

BARS = (
    Bar(figure="chat_growth", relation="at most", limit=1.03),
    Bar(figure="embedding_growth", relation="at most", limit=1.03),
    Bar(figure="unfinished", relation="at most", limit=0),
)


@dataclass(kw_only=True, slots=True)
class Sizes:
    """Resident size of one worker (MiB) by number of jobs that had ended."""

    pid: int
    seen: list[tuple[int, float]] = field(default_factory=list)

    def look(self, ended: int) -> None:
        self.seen.append((ended, psutil.Process(self.pid).memory_info().rss / 2**20))

    def median(self, first: float, last: float) -> float:
        """Of the sizes seen between two numbers of ended jobs."""
        found = [size for ended, size in self.seen if first <= ended <= last]
        if not found:
            raise BenchError("the worker was too quick to be looked at")
        return statistics.median(found)

    def growth(self, jobs: int) -> float:
        """The last fifth of the jobs over the fifth after `SETTLED`."""
        early = self.median(SETTLED * jobs, (SETTLED + 0.2) * jobs)
        return self.median(0.8 * jobs, jobs) / early


class Mix:
    """Requests of many shapes, the same ones in each run."""

    def __init__(self) -> None:
        self._random = random.Random(SEED)

    def next(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        words = " ".join(f"w{draw.randrange(5_000)}" for _ in range(draw.choice((3, 3, 8, 20))))
        kind = draw.random()
        if kind < 0.5:
            texts = [f"{words} {number}" for number in range(draw.choice((1, 1, 4)))]
            return "/v1/embeddings", {"model": EMBEDDING_MODEL, "input": texts}
        body: dict[str, Any] = {"model": MODEL, "max_tokens": draw.choice((1, 2, 4))}
        body |= draw.choice(
            (
                {"temperature": 0},
                {"temperature": 0.8, "top_p": 0.9},
                {"temperature": 1.0, "seed": draw.randrange(1_000)},
                {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.5},
                {"stream": True},
                {"stop": ["the"]},
            )
        )
        if kind < 0.6:
            return "/v1/completions", body | {"prompt": words}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}

    def cancels(self) -> bool:
        return self._random.random() < CANCELLED


async def load(url: str, key: str, jobs: int, sizes: list[Sizes]) -> Counter[str]:
    """Run the jobs; how many ended in which state."""
    ends: Counter[str] = Counter()
    mix, left = Mix(), jobs

    async def one_after_the_other(client: AsyncClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            endpoint, body = mix.next()
            cancel = mix.cancels()
            job = await client.submit(endpoint, body)
            if cancel:
                await client.cancel(job.id)
            ended = await client.wait(job.id, timeout_s=JOB_S)
            ends[ended.status] += 1
            if ends.total() % 1_000 == 0:
                shown = ", ".join(f"{size.seen[-1][1]:,.0f} MiB" for size in sizes)
                say(f"{ends.total():,} of {jobs:,} jobs: {shown}")

    async def look() -> None:
        while True:
            for size in sizes:
                size.look(ends.total())
            await asyncio.sleep(SAMPLE_EVERY_S)

    async with AsyncClient(url, key) as client:
        looking = asyncio.create_task(look())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(one_after_the_other(client))
        finally:
            looking.cancel()
    return ends


def worker_pid(child: Child, model: str) -> int:
    for process in psutil.Process(child.process.pid).children(recursive=True):
        if f"--model {model}" in " ".join(process.cmdline()):
            return int(process.pid)
    raise BenchError(f"no worker of {model} was found")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=JOBS)
    jobs = parser.parse_args().jobs
    where = conditions("torch", "transformers", "celery")
    with Lab() as lab:
        ports = ["--api-port", "0", "--flower-port", "0"]
        command = python("api.cli", "up", "--data-dir", str(lab.folder / "stack"), *ports)
        stack = lab.start(command, name="forebay-up", piped=True)
        ready = stack.read_json()
        models = (MODEL, EMBEDDING_MODEL)
        sizes = [Sizes(pid=worker_pid(stack, model)) for model in models]
        began = time.monotonic()
        ends = asyncio.run(load(ready["api"], ready["admin_key"], jobs, sizes))
        seconds = time.monotonic() - began
    print(f"{jobs:,} mixed jobs in {seconds:,.0f} s, {AT_ONCE} at once\n{where}\n")
    print(", ".join(f"{count:,} {status}" for status, count in ends.most_common()), end="\n\n")
    rows = []
    for model, size in zip(models, sizes, strict=True):
        tenths = [size.median(part * jobs / 10, (part + 1) * jobs / 10) for part in range(10)]
        rows.append([model, *(f"{each:,.0f}" for each in tenths), f"{size.growth(jobs):.3f}"])
    headings = ["worker, MiB by tenth of the jobs", *map(str, range(1, 11)), "growth"]
    print(table(headings, rows), end="\n\n")
    figures = {
        "jobs": float(jobs),
        "chat_growth": sizes[0].growth(jobs),
        "embedding_growth": sizes[1].growth(jobs),
        "unfinished": float(jobs - ends["completed"] - ends["cancelled"]),
    }
    return report("memory", figures, BARS)


if __name__ == "__main__":
    run(main)
