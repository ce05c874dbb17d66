"""Fair shares: weights, bands, a newcomer, the published service gap; against Celery and a FIFO.

What concerns shares is counted on a clock of decode steps with real claims and completions on
Valkey (`loadtests.batching`); what concerns time runs on a real worker with the simulated engine.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker.jobs import BAND_SHARES, Band
from broker.policies import TenantPolicy
from loadtests.batching import Fair, Fifo, Served, Source, Work, serve
from loadtests.harness import Bar, conditions, percentile, report, say, table
from loadtests.lab import Lab, pin_load, run, until
from loadtests.live import LiveWorker
from loadtests.queue_sides import FIRST, SECOND, THREADS, Forebay, Stock
from loadtests.shares import GapMeter, jain, normalised, share_error, vtc_bound, while_backlogged
from loadtests.stack import MODEL

SLOTS = 16
WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
EQUAL = {"short": 1.0, "long": 1.0, "reader": 1.0, "writer": 1.0}
#: Enough that what runs at the end of a window weighs less than the bars allow.
JOBS_EACH = 1_500
LIVE_JOBS_EACH = 500

HOARD = 10_000
NEWCOMERS = 5
NAP_MS = 5.0

#: The flood: slots that the queue keeps free of batch jobs, and that a tenant's cap may.
FLOOD_SLOTS, HEADROOM = 32, 8
FLOOD_STEP_MS = 10.0
FLOOD_ROUNDS, FLOOD_WINDOW_S = 3, 5.0
INTERACTIVE_PER_S = 20.0

BARS = (
    Bar(figure="share_error", relation="at most", limit=0.02),
    Bar(figure="jain", relation="at least", limit=0.99),
    Bar(figure="vtc_gap_ratio", relation="at most", limit=1.0),
    Bar(figure="uneven_share_error", relation="at most", limit=0.02),
    Bar(figure="uneven_vtc_gap_ratio", relation="at most", limit=1.0),
    Bar(figure="live_share_error", relation="at most", limit=0.03),
    Bar(figure="newcomer_wait_ms", relation="at most", limit=50.0),
    Bar(figure="batch_share_ratio", relation="at least", limit=0.95),
    Bar(figure="uneven_batch_share_ratio", relation="at least", limit=0.95),
    Bar(figure="interactive_p95_ratio", relation="at most", limit=1.2),
    Bar(figure="interactive_p95_ratio_capped", relation="at most", limit=1.2),
)

Part = Callable[[Lab], tuple[dict[str, float], str]]


# -- workloads -------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Lengths of a tenant's jobs, drawn evenly; `used`: the part of `max_tokens` that is made."""

    prompts: tuple[int, int] = (10, 200)
    answers: tuple[int, int] = (10, 200)
    used: float = 1.0

    def draw(self, source: random.Random, tenant: str, band: Band = Band.STANDARD) -> Work:
        prompt, answer = source.randint(*self.prompts), source.randint(*self.answers)
        most = round(answer / self.used)
        return Work(tenant=tenant, band=band, prompt=prompt, answer=answer, cost=prompt + most)


def workload(profiles: dict[str, Profile], jobs_each: int) -> list[Work]:
    """The same jobs in the same random order each time."""
    draw = random.Random(1996)
    jobs = [
        profile.draw(draw, tenant) for tenant, profile in profiles.items() for _ in range(jobs_each)
    ]
    draw.shuffle(jobs)
    return jobs


#: Tenants of very different shape; none says more than it takes.
SHAPES = {
    "short": Profile(prompts=(10, 50), answers=(5, 20)),
    "long": Profile(prompts=(200, 400), answers=(100, 200)),
    "reader": Profile(prompts=(300, 500), answers=(5, 20)),
    "writer": Profile(prompts=(10, 50), answers=(150, 300)),
}
#: The same lengths, but tenants differ in what they announce.
CLAIMS = {
    "short": Profile(used=1.0),
    "long": Profile(used=0.5),
    "reader": Profile(used=0.2),
    "writer": Profile(used=0.1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    title: str
    weights: dict[str, float]
    profiles: dict[str, Profile]
    jobs_each: int = JOBS_EACH
    #: Tenants differ in how much of their `max_tokens` they use; figures of their own.
    uneven: bool = False


MANY = {f"tenant-{number:02}": float(1 + number % 4) for number in range(24)}
SCENARIOS = (
    Scenario(
        title="weights 1:2:4, half of max_tokens used",
        weights=WEIGHTS,
        profiles=dict.fromkeys(WEIGHTS, Profile(used=0.5)),
    ),
    Scenario(
        title="24 tenants, weights 1-4",
        weights=MANY,
        profiles=dict.fromkeys(MANY, Profile(used=0.5)),
        jobs_each=300,
    ),
    Scenario(title="equal weights, unlike shapes", weights=EQUAL, profiles=SHAPES),
    Scenario(
        title="equal weights, 10-100 % of max_tokens used",
        weights=EQUAL,
        profiles=CLAIMS,
        uneven=True,
    ),
)


# -- shares ----------------------------------------------------------------------------------------
def shares(lab: Lab) -> tuple[dict[str, float], str]:
    """Tokens of tenants that are all backlogged, on our queue and on a FIFO."""
    url = lab.redis(name="valkey-shares")
    rows = []
    even: list[tuple[float, float, float]] = []
    uneven: list[tuple[float, float, float]] = []
    for scenario in SCENARIOS:
        work = workload(scenario.profiles, scenario.jobs_each)
        sources: dict[str, Source] = {"Forebay": Fair(url, scenario.weights), "FIFO": Fifo()}
        for label, source in sources.items():
            meter = GapMeter(scenario.weights)
            served = serve(
                source,
                work,
                slots=SLOTS,
                each_step=lambda now, m=meter: m.look(now.tenants),  # type: ignore[misc]
            )
            error = share_error(served.tenants, scenario.weights)
            index = jain(normalised(served.tenants, scenario.weights))
            bound = vtc_bound(max(each.prompt for each in work), served.batch_tokens)
            gap = meter.gap / bound
            if label == "Forebay":
                (uneven if scenario.uneven else even).append((error, index, gap))
            rows.append(
                [
                    scenario.title,
                    label,
                    _shown(served, scenario.weights),
                    f"{error:.1%}",
                    f"{index:.4f}",
                    f"{meter.gap:,.0f}",
                    f"{bound:,.0f}",
                ]
            )
            say(f"{scenario.title}, {label}: error {error:.1%}, Jain {index:.4f}, gap {gap:.2f}")
    errors, indices, gaps = zip(*even, strict=True)
    headings = ["all backlogged", "queue", "shares", "error", "Jain", "gap", "VTC bound"]
    figures = {"share_error": max(errors), "jain": min(indices), "vtc_gap_ratio": max(gaps)}
    figures["uneven_share_error"] = max(error for error, _, _ in uneven)
    figures["uneven_vtc_gap_ratio"] = max(gap for _, _, gap in uneven)
    return figures, table(headings, rows)


def _shown(served: Served, weights: dict[str, float]) -> str:
    total = sum(served.tenants.values())
    if len(weights) > 4:
        return f"{len(weights)} tenants"
    return " ".join(f"{served.tenants[tenant] / total:.3f}" for tenant in weights)


# -- shares on real workers ------------------------------------------------------------------------
def live_shares(lab: Lab) -> tuple[dict[str, float], str]:
    """The same jobs of 5 ms, in the same order, on our worker and on a stock one: job starts."""
    order = [tenant for tenant in WEIGHTS for _ in range(LIVE_JOBS_EACH)]
    random.Random(4).shuffle(order)
    policies = {
        tenant: TenantPolicy(weight=weight, max_in_flight=1_000)
        for tenant, weight in WEIGHTS.items()
    }
    ours = LiveWorker(lab, policies, slots=THREADS, step_ms=NAP_MS)
    ours.child.pause()
    ids = ours.put_each(order, answers=[1])
    ours.child.resume()
    began = {"Forebay": [float(each.started_ms) for each in ours.wait_for(ids)]}
    ours.child.stop()

    stock = Stock(lab, results=True, nap_ms=NAP_MS)
    stock.child.pause()
    sent = [stock.fill(1, tenant=tenant)[0] for tenant in order]
    stock.child.resume()
    until(lambda: stock.left() == 0, what=stock.label, child=stock.child)
    # `waits_ms` counts from each job's own enqueue; the order of starts is what is wanted.
    began["stock Celery"] = stock.began_ms(sent)
    stock.child.stop()

    rows, figures = [], {}
    for label, times in began.items():
        starts: dict[str, list[float]] = {tenant: [] for tenant in WEIGHTS}
        for tenant, at in zip(order, times, strict=True):
            starts[tenant].append(at)
        served = while_backlogged(starts)
        total = sum(served.values())
        error, index = share_error(served, WEIGHTS), jain(normalised(served, WEIGHTS))
        figures[label] = error
        parts = " ".join(f"{served[tenant] / total:.3f}" for tenant in WEIGHTS)
        rows.append([label, parts, f"{error:.1%}", f"{index:.4f}"])
        say(f"1:2:4 on a real worker, {label}: error {error:.1%}, Jain {index:.4f}")
    headings = [f"1:2:4, {len(order):,} jobs of {NAP_MS:g} ms, real worker", "shares"]
    headings += ["error", "Jain"]
    return {"live_share_error": figures["Forebay"]}, table(headings, rows)


# -- a newcomer ------------------------------------------------------------------------------------
def newcomer(lab: Lab) -> tuple[dict[str, float], str]:
    """A second tenant's few jobs behind a first tenant's many."""
    rows = []
    worst: dict[str, float] = {}
    for side in (Forebay(lab, step_ms=NAP_MS), Stock(lab, results=True, nap_ms=NAP_MS)):
        side.child.pause()
        side.fill(HOARD, tenant=FIRST)
        side.child.resume()
        start = side.left()
        until(lambda side=side, at=start: side.left() < at - 200, what=f"{side.label} to work")  # type: ignore[misc]
        new = side.fill(NEWCOMERS, tenant=SECOND)
        until(lambda side=side, ids=new: side.ended(ids), what=side.label, child=side.child)  # type: ignore[misc]
        waits = side.waits_ms(new)
        worst[side.label] = max(waits)
        rows.append(
            [
                side.label,
                f"{waits[0]:,.0f}",
                f"{statistics.median(waits):,.0f}",
                f"{max(waits):,.0f}",
            ]
        )
        say(f"newcomer behind {HOARD:,} jobs, {side.label}: first job waited {waits[0]:,.0f} ms")
        side.child.stop()
    headings = [f"{NEWCOMERS} jobs behind {HOARD:,} of {NAP_MS:g} ms", "first waits ms"]
    headings += ["median ms", "longest ms"]
    return {"newcomer_wait_ms": worst["Forebay"]}, table(headings, rows)


# -- bands -----------------------------------------------------------------------------------------
def bands(lab: Lab) -> tuple[dict[str, float], str]:
    """Tokens of each band when all are overloaded, over what is guaranteed to it."""
    url = lab.redis(name="valkey-bands")
    even = Profile(used=0.5)
    cases = {
        "interactive and batch": ({Band.INTERACTIVE: even, Band.BATCH: even}, False),
        "all three": (dict.fromkeys(Band, even), False),
        "interactive uses 100 % of max_tokens, batch 20 %": (
            {Band.INTERACTIVE: Profile(used=1.0), Band.BATCH: Profile(used=0.2)},
            True,
        ),
    }
    rows: list[list[str]] = []
    kept: dict[bool, list[float]] = {True: [], False: []}
    for title, (profiles, uneven) in cases.items():
        draw = random.Random(75)
        weights = {f"{band}-{number}": 1.0 for band in profiles for number in range(2)}
        work = [
            profile.draw(draw, f"{band}-{number}", band)
            for band, profile in profiles.items()
            for number in range(2)
            for _ in range(2_000 if band == Band.INTERACTIVE else 1_000)
        ]
        served = serve(Fair(url, weights), work, slots=SLOTS)
        total = sum(served.bands.values())
        due = {band: BAND_SHARES[band] / sum(BAND_SHARES[b] for b in profiles) for band in profiles}
        ratio = served.bands[Band.BATCH] / total / due[Band.BATCH]
        kept[uneven].append(ratio)
        parts = ", ".join(f"{band} {served.bands[band] / total:.3f}" for band in profiles)
        rows.append([title, parts, f"{due[Band.BATCH]:.4f}", f"{ratio:.2f}"])
        say(f"bands, {title}: batch has {ratio:.2f} of its guarantee")
    headings = ["bands overloaded", "shares", "batch is guaranteed", "batch has x this"]
    figures = {"batch_share_ratio": min(kept[False]), "uneven_batch_share_ratio": min(kept[True])}
    return figures, table(headings, rows)


def flood(lab: Lab) -> tuple[dict[str, float], str]:
    """Waits of interactive jobs on a worker that is idle but for them, and in a flood of batch.

    The ratio is that of the time from submit to end: waits are a few milliseconds, which is the
    resolution of the records' times.
    """
    most = FLOOD_SLOTS - HEADROOM
    policies = {
        "people": TenantPolicy(max_in_flight=1_000),
        "capped": TenantPolicy(max_in_flight=most),
        "unbounded": TenantPolicy(max_in_flight=1_000),
    }
    worker = LiveWorker(lab, policies, slots=FLOOD_SLOTS, step_ms=FLOOD_STEP_MS)
    waits: dict[str, list[list[float]]] = {"": [], "capped": [], "unbounded": []}
    whole: dict[str, list[list[float]]] = {tenant: [] for tenant in waits}
    for number in range(FLOOD_ROUNDS):
        for tenant in waits:
            batch = []
            if tenant:
                answers = range(20, 60)
                batch = worker.put_each([tenant] * 2_000, answers=answers, band=Band.BATCH)
                until(lambda: worker.queue.stats(MODEL).in_flight >= most, what="the flood")
            ids = worker.arrivals(
                "people",
                per_s=INTERACTIVE_PER_S,
                seconds=FLOOD_WINDOW_S,
                answer=16,
                seed=number,
            )
            done = worker.wait_for(ids)
            worker.clear(batch)
            waits[tenant].append([float(each.started_ms - each.created_ms) for each in done])
            whole[tenant].append([float(each.finished_ms - each.created_ms) for each in done])
            say(f"flood {tenant or 'none'}: wait p95 {percentile(waits[tenant][-1], 95):.0f} ms")
    worker.child.stop()
    titles = {
        "": "no batch jobs",
        "capped": f"flood of a tenant capped at {most} of {FLOOD_SLOTS} slots",
        "unbounded": f"flood of a tenant without a cap below the {FLOOD_SLOTS} slots",
    }
    rows = [
        [
            titles[tenant],
            *(f"{_pooled(waits[tenant], percent):.0f}" for percent in (50, 95)),
            *(f"{_pooled(whole[tenant], percent):.0f}" for percent in (50, 95)),
            f"{_ratio(whole[tenant], whole['']):.2f}",
        ]
        for tenant in waits
    ]
    headings = ["interactive jobs of 16 tokens", "wait p50 ms", "p95 ms"]
    headings += ["to the end p50 ms", "p95 ms", "p95 x idle"]
    figures = {
        "interactive_p95_ratio": _ratio(whole["unbounded"], whole[""]),
        "interactive_p95_ratio_capped": _ratio(whole["capped"], whole[""]),
        "interactive_wait_p95_ms_idle": _pooled(waits[""], 95),
        "interactive_wait_p95_ms": _pooled(waits["unbounded"], 95),
        "interactive_wait_p95_ms_capped": _pooled(waits["capped"], 95),
    }
    return figures, table(headings, rows)


def _pooled(rounds: Sequence[Sequence[float]], percent: float) -> float:
    return percentile([value for values in rounds for value in values], percent)


def _ratio(candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> float:
    """Median over the rounds of p95 over p95; a wait below a millisecond counts as one."""
    return statistics.median(
        max(percentile(ours, 95), 1.0) / max(percentile(theirs, 95), 1.0)
        for ours, theirs in zip(candidate, baseline, strict=True)
    )


def main() -> int:
    where = conditions("celery", "kombu", "redis")
    figures: dict[str, float] = {}
    tables = []
    parts: tuple[Part, ...] = (shares, bands, live_shares, newcomer, flood)
    with Lab() as lab:
        pin_load()
        for part in parts:
            found, shown = part(lab)
            figures |= found
            tables.append(shown)
    print("Fair shares: tokens while all tenants are backlogged, waits on a real worker")
    print(where, *tables, sep="\n\n", end="\n\n")
    return report("fairness", figures, BARS)


if __name__ == "__main__":
    run(main)
