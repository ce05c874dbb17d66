"""Kill everything at random moments, under load, and count what was lost.

A real stack (API processes, workers with the simulated engine, Valkey with an append-only file
written at every change, a proxy in between) serves several tenants whose client keeps a ledger of
its own. Meanwhile workers, API processes and Valkey are killed with SIGKILL, connections are cut,
workers are stopped past their leases and drained. At the end every accepted job must have ended
exactly once, with its events in order. `--short` is the version of the test suite. With
`--sentinel` Valkey has a replica that takes over when the primary is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, replace

from loadtests.chaos_checks import Verdict, judge
from loadtests.chaos_client import Client
from loadtests.chaos_faults import Faults, Plan
from loadtests.chaos_sentinel import SentinelStack
from loadtests.chaos_stack import APIS, LEASE_TTL_S, MAX_ATTEMPTS, WORKERS, ChaosStack
from loadtests.harness import Bar, BenchError, conditions, percentile, report, say, table
from loadtests.lab import Lab, run
from loadtests.stack import MODEL

FULL = Plan(
    seed=0,
    seconds=420,
    rate=8,
    worker_kills=100,
    api_kills=10,
    redis_kills=10,
    cuts=10,
    demotions=8,
    pauses=8,
    drains=8,
)
SHORT = Plan(
    seed=0,
    seconds=12,
    rate=12,
    worker_kills=6,
    api_kills=1,
    redis_kills=1,
    cuts=1,
    demotions=1,
    pauses=1,
    drains=1,
)
SENTINEL = Plan(
    seed=0,
    seconds=100,
    rate=8,
    worker_kills=15,
    api_kills=3,
    redis_kills=0,
    cuts=0,
    demotions=0,
    pauses=2,
    drains=2,
    failovers=12,
)
TENANTS = ("amber", "birch", "cedar", "delta")
#: After the last fault all jobs must be through within this time.
SETTLE_S = 60.0
#: Bound of the whole run, beyond the time the faults are spread over.
SLACK_S = 180.0
JUDGE_S = 90.0


@dataclass(slots=True)
class Outcome:
    verdict: Verdict
    faults: Faults
    client: Client
    stale_writes: int
    settle_s: float
    seconds: float
    proxy: str


async def torment(lab: Lab, plan: Plan) -> Outcome:
    """One run; raises `BenchError` when the stack can't be brought back."""
    stack = SentinelStack(lab) if plan.failovers else ChaosStack(lab)
    try:
        accounts = await stack.start(list(TENANTS))
        say(f"{APIS} API processes and {WORKERS} workers are up")
        secrets = {name: secret for name, (_, secret) in accounts.items()}
        began = time.monotonic()
        async with Client(
            stack.api_ports, secrets, seed=plan.seed, max_attempts=MAX_ATTEMPTS
        ) as client:
            faults = Faults(plan, stack, client)
            stop = asyncio.Event()
            async with asyncio.timeout(plan.seconds + SLACK_S), asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(faults.watch())
                tasks.create_task(client.traffic(plan.rate, stop))
                await faults.run()
                stop.set()
                ended = time.monotonic()
                say("faults are over; waiting for the jobs to end")
                await _settle(stack, client)
                settle_s = time.monotonic() - ended
                watch.cancel()
            tenant_ids = {name: tenant_id for name, (tenant_id, _) in accounts.items()}
            say("judging")
            async with asyncio.timeout(JUDGE_S):
                verdict = await judge(client, stack, tenant_ids)
            return Outcome(
                verdict=verdict,
                faults=faults,
                client=client,
                stale_writes=stack.queue.stats(MODEL).stale_writes,
                settle_s=settle_s,
                seconds=time.monotonic() - began,
                proxy=stack.proxy_name,
            )
    finally:
        stack.close()


async def _settle(stack: ChaosStack, client: Client) -> None:
    """Until no client waits and no job is left, or time is up; the judge tells which."""
    deadline = time.monotonic() + SETTLE_S
    left = await client.settled(SETTLE_S)
    if left:
        say(f"{left} clients still wait")
    while time.monotonic() < deadline:
        stats = await asyncio.to_thread(stack.queue.stats, MODEL)
        if not stats.depth + stats.in_flight + stats.delayed:
            return
        await asyncio.sleep(0.1)


def _show(outcome: Outcome, where: str, plan: Plan) -> int:
    verdict, faults, ledger = outcome.verdict, outcome.faults, outcome.client.ledger
    recoveries = faults.recoveries
    alone_s, all_s = recoveries.alone_s, recoveries.alone_s + recoveries.disturbed_s
    done = faults.done
    struck: list[tuple[str, object]] = [
        ("kill -9 of workers", done["worker_kill"]),
        ("kill -9 of API processes amid submits", done["api_kill"]),
        ("kill -9 and restart of Valkey", done["redis_kill"]),
        (f"all connections cut ({outcome.proxy})", done["cut"]),
        ("Valkey made a replica for a while: READONLY", done["demotion"]),
        ("kill -9 of the primary, its replica takes over", done["failover"]),
        ("worker stopped past its leases, then woken", done["pause"]),
        ("worker drained", done["drain"]),
    ]  # fmt: skip
    rows: list[tuple[str, object]] = [
        ("seed", plan.seed),
        # What the plan has none of isn't told of.
        *(row for row in struck if row[1]),
        ("exit statuses of drained workers", dict(faults.drain_statuses)),
        ("until there is a replica again p50 / max", _times(faults.failovers_s)),
        ("jobs accepted / submits cut / replays / refused",
         f"{len(ledger.accepted)} / {ledger.cut} / {ledger.replayed} / {ledger.refused}"),
        ("ends", ", ".join(f"{n} {name}" for name, n in sorted(verdict.ends.items()))),
        ("most attempts of a job", verdict.attempts_max),
        ("lost", verdict.lost),
        ("finished twice", verdict.doubled),
        ("events out of order", verdict.disordered),
        ("stuck", verdict.stuck),
        ("failed for no fault of theirs", verdict.failed),
        ("stale writes refused", outcome.stale_writes),
        ("recovery p50 / max, no other fault meanwhile", _times(alone_s)),
        ("recovery p50 / max, all", _times(all_s)),
        ("  of jobs: started again / ended otherwise", f"{len(all_s)} / {recoveries.ended}"),
        ("all jobs ended after the last fault within", f"{outcome.settle_s:.1f} s"),
        ("run", f"{outcome.seconds:.0f} s"),
    ]  # fmt: skip
    print(where)
    print(
        f"lease TTL {LEASE_TTL_S:g} s, {WORKERS} workers, {APIS} API processes, "
        f"{len(TENANTS)} tenants, {plan.rate:g} jobs/s, appendfsync always, simulated engine\n"
        + ("a primary, a replica and a Sentinel, AWAIT_REPLICAS=1\n" if plan.failovers else "")
    )
    print(table(("", "found"), rows))
    for note in verdict.notes:
        print(note)
    print()
    for error in ledger.broken[:5]:
        print(f"broken: {error}")
    zeros = ["lost", "stuck", "failed", "refused", "broken"]
    # A failover may undo what its replica had not heard of, ends and events among it.
    zeros += ["doubled", "disordered"] if not plan.failovers else []
    bars = [Bar(figure="faults", relation="at least", limit=plan.faults)]
    bars += [Bar(figure=name, relation="at most", limit=0) for name in zeros]
    figures = {
        "faults": done.total(),
        "worker_kills": done["worker_kill"],
        "failovers": done["failover"],
        "jobs": len(ledger.accepted),
        "lost": verdict.lost,
        "doubled": verdict.doubled,
        "disordered": verdict.disordered,
        "stuck": verdict.stuck,
        "failed": verdict.failed,
        "refused": len(ledger.entries) - len(ledger.accepted),
        "broken": len(ledger.broken),
        "stale_writes": outcome.stale_writes,
        "recovery_p50_s": percentile(alone_s, 50) if alone_s else 0.0,
        "recovery_alone_max_s": max(alone_s, default=0.0),
        "recovery_max_s": max(all_s, default=0.0),
    }
    return report("chaos_failover" if plan.failovers else "chaos", figures, bars)


def _times(values: list[float]) -> str:
    return f"{percentile(values, 50):.2f} / {max(values):.2f} s" if values else "none measured"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos", description=__doc__)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--short", action="store_true", help="few faults, for the test suite")
    kinds.add_argument(
        "--sentinel", action="store_true", help="kills of a primary whose replica takes over"
    )
    parser.add_argument("--seed", type=int, help="order and moments of the faults; default: random")
    parser.add_argument("--seconds", type=float, help="time the faults are spread over, about")
    parser.add_argument("--kills", type=int, help="kill -9 of workers")
    arguments = parser.parse_args()
    plan = SHORT if arguments.short else SENTINEL if arguments.sentinel else FULL
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    plan = replace(
        plan,
        seed=seed,
        seconds=arguments.seconds or plan.seconds,
        worker_kills=arguments.kills if arguments.kills is not None else plan.worker_kills,
    )
    say(f"seed {seed}: {plan.faults} faults in about {plan.seconds:g} s")
    where = conditions("redis", "aiohttp", "celery")
    with Lab() as lab:
        try:
            outcome = asyncio.run(torment(lab, plan))
        except TimeoutError:
            raise BenchError("the run took longer than it may; its jobs were not judged") from None
        except ExceptionGroup as group:
            explained, rest = group.split(BenchError)
            if explained is None or rest is not None:
                raise
            raise BenchError(str(explained.exceptions[0])) from None
        return _show(outcome, where, plan)


if __name__ == "__main__":
    run(main)
