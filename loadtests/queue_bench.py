"""The queue against stock Celery on Redis: no-op jobs a second, a newcomer's wait, script cost.

No-op jobs: a filled queue is emptied by one worker of 8 threads on one core; Redis has the other.
Ours runs the whole life of a job (lease, record, events, stored result) with the simulated engine
at zero step time, a stock worker runs an empty task.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from loadtests.harness import Bar, conditions, median_ratio, percentile, report, say, table
from loadtests.lab import Lab, pin_load, run, until
from loadtests.queue_sides import FIRST, SECOND, THREADS, Forebay, Side, Stock
from loadtests.script_cost import CostProbe

ROUNDS = 4
NOOP_JOBS = 4_000

HOARD = 5_000
NEWCOMERS = 5
NAP_MS = 5.0
#: The hoarder's jobs are well under way when the newcomer comes.
HEAD_START_S = 0.3

COST_ROUNDS = 3
MANY_TENANTS = 10_000

BARS = (
    Bar(figure="vs_stock", relation="at least", limit=1.5),
    Bar(figure="newcomer_wait_ms", relation="at most", limit=50.0),
    Bar(figure="tenants_10k_ratio", relation="at most", limit=1.5),
)


def drain_rate(side: Side, jobs: int) -> float:
    """Jobs a second from the moment the worker may go until none is left."""
    side.child.pause()
    ids = side.fill(jobs)
    side.child.resume()
    began = time.perf_counter()
    until(lambda: side.left() == 0, what=f"{side.label} to finish", child=side.child, every_s=0.005)
    rate = jobs / (time.perf_counter() - began)
    side.finished(ids)
    return rate


def noop_rounds(
    sides: Sequence[Side], *, rounds: int, jobs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Jobs per second, and CPU microseconds of the worker per job, by side and round.

    Every second round goes in the opposite order.
    """
    rates: dict[str, list[float]] = {side.label: [] for side in sides}
    cpu_us: dict[str, list[float]] = {side.label: [] for side in sides}
    for number in range(rounds):
        for side in reversed(sides) if number % 2 else sides:
            cpu_before = side.child.cpu_s()
            rate = drain_rate(side, jobs)
            cpu_us[side.label].append((side.child.cpu_s() - cpu_before) / jobs * 1e6)
            rates[side.label].append(rate)
            say(f"no-op round {number + 1}/{rounds} {side.label}: {rate:,.0f} jobs/s")
    return rates, cpu_us


def noop(lab: Lab) -> tuple[dict[str, float], str]:
    """Rounds of all sides."""
    stock, ignoring, ours = Stock(lab, results=True), Stock(lab, results=False), Forebay(lab)
    sides: list[Side] = [ours, stock, ignoring]
    rates, cpu_us = noop_rounds(sides, rounds=ROUNDS, jobs=NOOP_JOBS)
    for side in sides:
        side.child.stop()
    figures = {
        "vs_stock": median_ratio(rates[ours.label], rates[stock.label]),
        "vs_stock_ignore_result": median_ratio(rates[ours.label], rates[ignoring.label]),
    }
    versus = {stock.label: figures["vs_stock"], ignoring.label: figures["vs_stock_ignore_result"]}
    rows = [
        [
            label,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f}-{max(values):,.0f}",
            f"{statistics.median(cpu_us[label]):.0f}",
            f"{versus[label]:.2f}" if label in versus else "",
        ]
        for label, values in rates.items()
    ]
    headings = [f"no-op jobs, {THREADS} threads", "done/s (median)", "rounds"]
    headings += ["worker's CPU µs each", "Forebay is × this"]
    return figures, table(headings, rows)


def newcomer(lab: Lab) -> tuple[dict[str, float], str]:
    """A second tenant's few jobs behind a first tenant's many."""
    rows = []
    worst: dict[str, float] = {}
    for side in (Stock(lab, results=True, nap_ms=NAP_MS), Forebay(lab, step_ms=NAP_MS)):
        side.child.pause()
        hoard = side.fill(HOARD, tenant=FIRST)
        side.child.resume()
        time.sleep(HEAD_START_S)
        new = side.fill(NEWCOMERS, tenant=SECOND)
        until(lambda side=side: side.left() == 0, what=f"{side.label}", child=side.child)  # type: ignore[misc]
        side.finished(hoard + new)
        waits = side.waits_ms(new)
        worst[side.label] = max(waits)
        first = percentile(side.waits_ms(hoard), 50)
        rows.append(
            [side.label, f"{statistics.median(waits):,.0f}", f"{max(waits):,.0f}", f"{first:,.0f}"]
        )
        say(f"newcomer behind {HOARD} jobs, {side.label}: waited {max(waits):,.0f} ms at most")
        side.child.stop()
    headings = [
        f"{NEWCOMERS} jobs behind {HOARD:,} of {NAP_MS:g} ms",
        "newcomer's wait p50 ms",
        "longest ms",
        "hoarder's wait p50 ms",
    ]
    return {"newcomer_wait_ms": worst["Forebay"]}, table(headings, rows)


def script_cost(lab: Lab) -> tuple[dict[str, float], str]:
    """Microseconds of Redis per job with one tenant waiting and with very many."""
    probes = [
        CostProbe(lab.redis(name=f"valkey-{tenants}"), tenants=tenants)
        for tenants in (1, MANY_TENANTS)
    ]
    for number in range(COST_ROUNDS):
        for probe in reversed(probes) if number % 2 else probes:
            cost = probe.measure()
            say(f"scripts with {probe.tenants:,} tenants: {cost.total_us:.1f} µs per job")
    one, many = probes
    totals = [[cost.total_us for cost in probe.rounds] for probe in (many, one)]
    rows = [
        [
            f"{probe.tenants:,}",
            *(
                f"{statistics.median(getattr(cost, part) for cost in probe.rounds):.1f}"
                for part in ("enqueue_us", "claim_us", "complete_us", "total_us")
            ),
        ]
        for probe in (one, many)
    ]
    headings = ["tenants waiting", "enqueue µs", "claim µs", "complete µs", "a job's life µs"]
    return {"tenants_10k_ratio": median_ratio(*totals)}, table(headings, rows)


def main() -> int:
    where = conditions("celery", "kombu", "redis")
    figures: dict[str, float] = {}
    tables = []
    with Lab() as lab:
        pin_load()
        for part in (noop, newcomer, script_cost):
            found, shown = part(lab)
            figures |= found
            tables.append(shown)
    print("The queue: one worker process on one core, Valkey without persistence on the other")
    print(where, *tables, sep="\n\n", end="\n\n")
    return report("queue", figures, BARS)


if __name__ == "__main__":
    run(main)
