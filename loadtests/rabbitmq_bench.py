"""RabbitMQ as the broker against Redis as the broker: no-op jobs a second, and a lone job's wait.

Both sides keep their jobs in Redis and run their whole life with the simulated engine at zero step
time; one worker of 8 threads on one core, Redis and RabbitMQ on the other.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from loadtests.harness import Bar, BenchError, conditions, median_ratio, report, table
from loadtests.lab import Lab, free_port, pin_load, run, until
from loadtests.queue_bench import noop_rounds
from loadtests.queue_sides import THREADS, Forebay
from loadtests.rabbitmq_node import SCRIPT, RabbitMq

ROUNDS = 4
JOBS = 3_000
LONE_JOBS = 60

#: A third is what the hop was thought to leave when it was designed.
BARS = (Bar(figure="vs_redis", relation="at least", limit=0.33),)


def measure(sides: list[Forebay]) -> tuple[dict[str, float], str]:
    """Rounds of both sides."""
    rates, cpu_us = noop_rounds(sides, rounds=ROUNDS, jobs=JOBS)
    waits = {side.label: lone_waits_ms(side) for side in sides}
    redis, tickets = (side.label for side in sides)
    rows = [
        [
            label,
            f"{statistics.median(rates[label]):,.0f}",
            f"{min(rates[label]):,.0f}-{max(rates[label]):,.0f}",
            f"{statistics.median(cpu_us[label]):.0f}",
            f"{statistics.median(waits[label]):.0f} / {max(waits[label]):.0f}",
        ]
        for label in (redis, tickets)
    ]
    headings = [f"no-op jobs, {THREADS} threads", "done/s (median)", "rounds"]
    headings += ["worker's CPU µs each", "a lone job's wait p50 / max ms"]
    figures = {
        "vs_redis": median_ratio(rates[tickets], rates[redis]),
        "lone_wait_ms": statistics.median(waits[tickets]),
    }
    return figures, table(headings, rows)


def lone_waits_ms(side: Forebay) -> list[float]:
    """From enqueue to start, one job after the other."""
    ids = []
    for _ in range(LONE_JOBS):
        ids += side.fill(1)
        until(lambda: side.left() == 0, what=side.label, child=side.child, every_s=0.003)
    return side.waits_ms(ids)


def main() -> int:
    if not SCRIPT.exists():
        raise BenchError("rabbitmq-server is not installed (infra/test-services.sh)")
    where = conditions("celery", "kombu", "amqp", "redis")
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="forebay-rabbitmq-") as folder:
        pin_load()
        node = RabbitMq(Path(folder), (free_port(), free_port(), free_port()))
        try:
            node.start()
            sides = [Forebay(lab), Forebay(lab, broker_url=node.url)]
            figures, shown = measure(sides)
            for side in sides:
                side.child.stop()
        finally:
            node.close()
    print("RabbitMQ as the broker: one worker on one core, Valkey and RabbitMQ on the other")
    print(where, shown, sep="\n\n", end="\n\n")
    return report("rabbitmq", figures, BARS)


if __name__ == "__main__":
    run(main)
