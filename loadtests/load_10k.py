"""10,000 clients on one machine's API at once, each waiting for one result by stream or long poll.

All clients connect, submit and wait while the queue is paused; then the queue is let go and the
simulated engine's results come as fast as its stated step time allows. What a waiting client costs
is the growth of the API's resident memory over its warmed-up idle state. Delays count from the
moment the job was recorded as completed to the moment the client had all of its result. Once with
one API process, and once with two behind nginx.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtests import nginx
from loadtests.fronts import Front
from loadtests.harness import Bar, BenchError, conditions, percentile, report, say, table
from loadtests.lab import LOAD_CORE, Child, Lab, python, run, until
from loadtests.stack import MODEL, request_body

SIZES = (100, 1_000, 10_000)
#: Client processes; each has 20,000 descriptors at most.
CROWDS = 4
#: One token a job. A slot that is filled while a step runs joins at the next: about 700 results/s.
SLOTS = 64
STEP_MS = 45.0
#: Longest wait until all have submitted, and until all have their results.
OPEN_S = 60.0
RESULTS_S = 60.0
#: Clients whose only purpose is that the processes have done everything once.
WARM_UP = 200

BARS = (
    Bar(figure="failed", relation="at most", limit=0),
    Bar(figure="lost", relation="at most", limit=0),
    Bar(figure="doubled", relation="at most", limit=0),
    Bar(figure="results_per_s", relation="at least", limit=500),
    Bar(figure="kib_per_connection", relation="at most", limit=25),
    Bar(figure="delivery_p99_ms", relation="at most", limit=1_000),
)


@dataclass(kw_only=True, slots=True)
class Wave:
    """One size on one front, from the first connection to the last result."""

    clients: int
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    #: Growth of the API's resident memory a waiting stream, and a waiting poll.
    kib_stream: float = 0.0
    kib_poll: float = 0.0
    kib_nginx: float = 0.0
    submitted_per_s: float = 0.0
    results_per_s: float = 0.0
    #: The API's CPU time a job: connection, submit and wait; delivery.
    submit_cpu_us: float = 0.0
    delivery_cpu_us: float = 0.0
    #: Completion to receipt.
    delays_ms: list[float] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)

    @property
    def kib(self) -> float:
        return (self.kib_stream + self.kib_poll) / 2

    def delay_ms(self, percent: float) -> float:
        return percentile(self.delays_ms, percent) if self.delays_ms else float("nan")

    def row(self, label: str) -> list[str]:
        return [
            label,
            f"{self.clients:,}",
            f"{self.failed} / {self.lost} / {self.doubled}",
            f"{self.submitted_per_s:,.0f}",
            f"{self.results_per_s:,.0f}",
            f"{self.delay_ms(50):.0f} / {self.delay_ms(99):.0f}",
            f"{self.kib_stream:.1f} / {self.kib_poll:.1f}",
            f"{self.kib_nginx:.1f}" if self.kib_nginx else "",
            f"{self.submit_cpu_us:.0f} / {self.delivery_cpu_us:.0f}",
        ]


HEADINGS = (
    "front",
    "clients",
    "failed / lost / doubled",
    "submitted/s",
    "results/s",
    "delay p50 / p99 ms",
    "API KiB a stream / poll",
    "nginx KiB",
    "API CPU µs submit / delivery",
)


def _bodies() -> dict[str, Any]:
    job = {"endpoint": "/v1/chat/completions", "priority": "standard"}
    return {
        "stream": {**job, "body": {**request_body(), "stream": True}},
        "poll": {**job, "body": request_body()},
    }


class Crowds:
    """The client processes of one wave, told the same at the same time."""

    def __init__(self, lab: Lab, front: Front, name: str) -> None:
        self.children = [
            lab.start(
                python("loadtests.waiting_clients"), name=f"{name}-{k}", core=LOAD_CORE, piped=True
            )
            for k in range(CROWDS)
        ]
        plan = {"port": front.port, "key": front.key, "bodies": _bodies()}
        for child in self.children:
            self._tell(child, plan)

    @staticmethod
    def _tell(child: Child, command: dict[str, Any]) -> None:
        child.stdin.write(json.dumps(command).encode() + b"\n")
        child.stdin.flush()

    def _all(self, commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for child, command in zip(self.children, commands, strict=True):
            self._tell(child, command)
        return [child.read_json() for child in self.children]

    def open(self, way: str, clients: int) -> int:
        """Jobs accepted so far, once all of these clients have submitted or failed."""
        shares = [clients // CROWDS + (k < clients % CROWDS) for k in range(CROWDS)]
        commands = [{"open": way, "clients": share, "within_s": OPEN_S} for share in shares]
        return sum(answer["accepted"] for answer in self._all(commands))

    def collect(self) -> tuple[list[tuple[str, float]], Counter[str]]:
        """Each client's job and moment of receipt, and what went wrong."""
        results: list[tuple[str, float]] = []
        problems: Counter[str] = Counter()
        for answer in self._all([{"collect": True, "within_s": RESULTS_S}] * CROWDS):
            results += [(job_id, received_ms) for job_id, received_ms in answer["results"]]
            problems.update(answer["problems"])
        return results, problems

    def close(self) -> None:
        self._all([{"close": True}] * CROWDS)
        for child in self.children:
            child.stop()


def wave(lab: Lab, front: Front, clients: int, *, name: str) -> Wave:
    """Connect, submit, wait; let the queue go; collect and compare with the records."""
    seen = Wave(clients=clients)
    jobs_before = front.job_count()
    crowds = Crowds(lab, front, name)
    front.queue.pause(MODEL)
    rss, cpu, began = front.api_rss_kib(), front.api_cpu_s(), time.perf_counter()
    nginx_before = front.proxy_kib()
    streams = clients // 2
    accepted = crowds.open("stream", streams)
    seen.submitted_per_s = accepted / (time.perf_counter() - began)
    _until_waiting(front, accepted)
    rss_streams = front.api_rss_kib()
    accepted = crowds.open("poll", clients - streams)
    _until_waiting(front, accepted)
    rss_all, cpu_waiting = front.api_rss_kib(), front.api_cpu_s()
    seen.kib_stream = (rss_streams - rss) / streams
    seen.kib_poll = (rss_all - rss_streams) / (clients - streams)
    seen.kib_nginx = (front.proxy_kib() - nginx_before) / clients
    seen.submit_cpu_us = (cpu_waiting - cpu) / clients * 1e6
    front.queue.resume(MODEL)
    results, seen.problems = crowds.collect()
    seen.delivery_cpu_us = (front.api_cpu_s() - cpu_waiting) / clients * 1e6
    _judge(seen, front, results, jobs_before)
    crowds.close()
    return seen


def _until_waiting(front: Front, jobs: int) -> None:
    """Every accepted job has its subscriber; those of failed clients never will."""
    with contextlib.suppress(BenchError):
        until(lambda: front.waiting() >= jobs, what="all to wait", timeout_s=30, every_s=0.2)


def _judge(seen: Wave, front: Front, results: list[tuple[str, float]], jobs_before: int) -> None:
    """What the clients say against what the records say.

    Failed: a client without a result for its job that it was told something else about. Lost: an
    accepted job whose client never heard of its end, or that never ended. Doubled: a result or an
    event that came twice, a job that ended twice, and jobs beyond one for each client.
    """
    received = {job_id: at for job_id, at in results if job_id}
    endings = dict(zip(received, front.endings(list(received)), strict=True))
    without_result = sum(1 for _, at in results if not at)
    seen.lost = sum(1 for job_id, at in received.items() if not at or not endings[job_id][0])
    seen.failed = without_result + seen.clients - len(results) - seen.lost
    seen.failed = max(seen.failed, 0) + seen.problems["event missing"]
    seen.doubled = (
        seen.problems["more after the result"]
        + seen.problems["event repeated"]
        + sum(ends - 1 for _, ends in endings.values() if ends > 1)
        + max(front.job_count() - jobs_before - len(received), 0)
    )
    delivered = {job_id: at for job_id, at in received.items() if at and endings[job_id][0]}
    seen.delays_ms = [at - endings[job_id][0] for job_id, at in delivered.items()]
    if len(delivered) > 1:
        moments = sorted(endings[job_id][0] for job_id in delivered)
        seen.results_per_s = len(moments) / max(moments[-1] - moments[0], 1) * 1000


def main() -> int:
    where = conditions("aiohttp", "uvloop", "redis")
    waves: dict[tuple[int, int], tuple[str, Wave]] = {}
    processes = [1, 2] if nginx.program() else [1]
    for count in processes:
        with Lab() as lab:
            front = Front(lab, processes=count, slots=SLOTS, step_ms=STEP_MS)
            with contextlib.closing(front):
                wave(lab, front, WARM_UP, name=f"warm-up-{count}")
                for size in SIZES:
                    seen = wave(lab, front, size, name=f"clients-{count}-{size}")
                    waves[count, size] = front.label, seen
                    say(f"{front.label}, {size:,}: {seen.results_per_s:,.0f} results/s")
                    if seen.problems:
                        say(f"problems: {dict(seen.problems)}")
    largest = [waves[count, SIZES[-1]][1] for count in processes]
    alone = largest[0]
    every = [seen for _, seen in waves.values()]
    figures = {
        "clients": float(SIZES[-1]),
        "failed": float(sum(seen.failed for seen in every)),
        "lost": float(sum(seen.lost for seen in every)),
        "doubled": float(sum(seen.doubled for seen in every)),
        "results_per_s": min(seen.results_per_s for seen in largest),
        "kib_per_connection": max(seen.kib for seen in largest),
        "delivery_p50_ms": alone.delay_ms(50),
        "delivery_p99_ms": alone.delay_ms(99),
        "delivery_cpu_us": alone.delivery_cpu_us,
    }
    if len(largest) > 1:
        figures["nginx_delivery_p99_ms"] = largest[1].delay_ms(99)
    print("Clients that all wait at once, half by stream and half by long poll, one result each")
    print(f"{where}; simulated engine, {SLOTS} slots, {STEP_MS:g} ms a step\n")
    print(table(HEADINGS, [seen.row(label) for label, seen in waves.values()]), end="\n\n")
    if len(largest) == 1:
        print("nginx isn't installed: that half was not measured\n")
    return report("load-10k", figures, BARS)


if __name__ == "__main__":
    run(main)
