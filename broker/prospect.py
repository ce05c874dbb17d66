"""When will it be my turn? The start of a waiting job, foretold.

The model is a fluid one. The queue gets so many tokens/s done (`Prospect.tokens_per_s`). A job
starts when what goes before it has started: the jobs of its own tenant before it, and of each rival
in its band what start-time fair queueing (`fairness.py`) lets go first, which the virtual times
tell; but no more than the rival has waiting, or may run meanwhile under its cap. Tenants that have
little waiting and keep coming are taken to go on coming (`BandView.demand`).

The band gets what other bands leave it. One with a backlog takes its share until that is done; one
that lives on what comes in takes only that, and no more than its share. A tenant gets no more than
its cap's worth of slots.

Unknown to the model: workers that will come or go, tenants that will come or end, slots kept free
of batch jobs, costs that change. An estimate is as good as the next minute resembles the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from broker.drain import Drain
from broker.jobs import BAND_SHARES, BANDS, Band
from broker.pace import Pace
from broker.stats import Position

#: Jobs of a tenant that are counted for a position; further behind it is estimated.
COUNTED = 1_000
#: Rounds in which a wait and what goes first meanwhile are brought together, at most.
_ROUNDS = 32
#: Waits that differ by less are the same (s).
_CLOSE_S = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """Another tenant with jobs waiting in the band."""

    #: Its virtual time.
    at: float
    weight: float
    #: Most jobs it may run at once.
    cap: int
    waiting: int
    running: int
    #: Of one of its jobs.
    tokens: float
    #: Tenants that it stands for; above 1 where not all were looked at.
    count: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BandView:
    #: Waiting jobs; 0 where none of their tenants may run.
    waiting: int
    #: Tokens/s of tenants that live on what comes in: their jobs wait no longer than they run.
    demand: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """What the start of a tenant's waiting job in a band is foretold from."""

    now_ms: int
    band: Band
    #: What the whole queue gets done; see `tokens_per_s`. None when nothing was measured yet.
    tokens_per_s: float | None
    #: Tokens of a job: the tenant's, and any.
    own_tokens: float
    mean_tokens: float
    #: What one running job gets done; infinite while not measured.
    slot_tokens_per_s: float
    #: In the order of `BANDS`.
    bands: Sequence[BandView]
    #: The tenant's part of the demands.
    own_demand: float
    #: Virtual time of the tenant, now or as it would come back.
    at: float
    weight: float
    #: Of tenants nobody knows yet.
    default_weight: float
    cap: int
    running: int
    rivals: Sequence[Rival]


def tokens_per_s(
    drain: Drain | None, pace: Pace, now: int, oldest_ms: int, running: int
) -> float | None:
    """What a queue gets done whose oldest job waits since `oldest_ms`.

    As measured, or what its slots make together where that is more: the mean of a queue that was
    half idle says little of what it can do. When it stands still both shrink.
    """
    measured = drain.tokens_per_s if drain else None
    if drain is None or not measured:
        return None
    now_measured = drain.seen(now, oldest_ms).tokens_per_s or measured
    return max(measured, pace.together(running)) * now_measured / measured


def demand(coming: Drain | None, now: int) -> float:
    """Tokens/s that came in and were done at once."""
    return (coming.seen(now, 0).tokens_per_s or 0.0) if coming else 0.0


def job_tokens(*drains: Drain | None) -> float:
    """Tokens of a job by the first drain there is."""
    return next((max(each.tokens / each.jobs, 1.0) for each in drains if each), 1.0)


def position(view: Prospect, place: int, *, exact: bool = True, due_ms: int = 0) -> Position:
    """Of a job with `place` others of its tenant before it, or of a delayed one."""
    wait = start_in_s(view, place)
    return Position(
        position=place,
        exact=exact,
        estimated_start_ms=None if wait is None else max(view.now_ms, due_ms) + round(wait * 1000),
    )


def start_in_s(view: Prospect, place: int) -> float | None:
    """Expected wait of a job with `place` others of its tenant before it."""
    if not view.tokens_per_s:
        return None
    by_turn = _turn_s(view, place, _Way(view, view.tokens_per_s))
    # At the next start of any job, which is half an interval away on average.
    by_turn += view.mean_tokens / view.tokens_per_s / 2
    # So many jobs of its tenant must have ended first.
    over = max(place + 1 + view.running - view.cap, 0)
    each = view.own_tokens / (view.cap * view.slot_tokens_per_s)
    return max(by_turn, (over - 0.5) * each)


def _turn_s(view: Prospect, place: int, way: _Way) -> float:
    """When all has started that has its turn first, in seconds from now."""
    own = place * view.own_tokens
    until = view.at + own / view.weight
    rows = [
        (
            rival.count,
            rival.waiting * rival.tokens,
            max(until - rival.at, 0.0) * rival.weight,
            max(rival.cap - rival.running, 0) * rival.tokens,
            rival.cap * view.slot_tokens_per_s,
        )
        for rival in view.rivals
    ]
    coming = max(view.bands[BANDS.index(view.band)].demand - view.own_demand, 0.0)
    newcomers = own / view.weight * view.default_weight
    wait = 0.0
    for _ in range(_ROUNDS):
        first = room = 0.0
        for count, backlog, fair, free, cap in rows:
            # Without a measured speed a cap says nothing.
            limit = min(fair, free + cap * wait) if cap < inf else fair
            first += count * min(backlog, limit)
            room += count * max(limit - backlog, 0.0)
        first += min(coming * wait, max(room, newcomers))
        before, wait = wait, way.done_s(own + first)
        if wait - before < _CLOSE_S:
            break
    return wait


class _Way:
    """What the band gets done from now on, while other bands work their backlogs off."""

    def __init__(self, view: Prospect, tokens_per_s: float) -> None:
        #: (tokens/s, for how long); the last one is without end.
        self._stretches: list[tuple[float, float]] = []
        mine = BANDS.index(view.band)
        demands = [each.demand for each in view.bands]
        left = [each.waiting * view.mean_tokens for each in view.bands]
        left[mine] = inf
        while True:
            wanted = [inf if rest else demand for rest, demand in zip(left, demands, strict=True)]
            rates = _shared(tokens_per_s, wanted)
            shrinks = {
                b: rates[b] - demands[b]
                for b, rest in enumerate(left)
                if 0 < rest < inf and rates[b] > demands[b]
            }
            if not shrinks:
                self._stretches.append((rates[mine], inf))
                return
            done = min(shrinks, key=lambda b: left[b] / shrinks[b])
            lasts = left[done] / shrinks[done]
            self._stretches.append((rates[mine], lasts))
            for b, shrink in shrinks.items():
                left[b] = max(left[b] - lasts * shrink, 0.0)
            left[done] = 0.0

    def done_s(self, tokens: float) -> float:
        """Time in which the band gets so much done."""
        passed = 0.0
        for rate, lasts in self._stretches:
            if tokens <= rate * lasts:
                return passed + tokens / rate
            tokens -= rate * lasts
            passed += lasts
        return passed


def _shared(tokens_per_s: float, wanted: Sequence[float]) -> list[float]:
    """Tokens/s of each band: none gets more than it wants, the others the rest by their shares."""
    rates = [0.0] * len(wanted)
    hungry = [b for b, each in enumerate(wanted) if each > 0]
    while hungry:
        part = tokens_per_s / sum(BAND_SHARES[BANDS[b]] for b in hungry)
        sated = [b for b in hungry if wanted[b] <= part * BAND_SHARES[BANDS[b]]]
        for b in sated or hungry:
            rates[b] = min(wanted[b], part * BAND_SHARES[BANDS[b]])
        if not sated:
            break
        tokens_per_s -= sum(rates[b] for b in sated)
        hungry = [b for b in hungry if b not in sated]
    return rates
