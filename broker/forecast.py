"""When may a refused caller come back? Estimates from shares and drain rates.

The queue gets R tokens/s done (`drain.py`). A band with work gets its share of them over the shares
of all bands with work; a tenant gets its weight's part of its band, among the tenants that race in
it now; its jobs take as many tokens as they took lately. That gives the tenant's jobs/s. Cheap
enough for a storm of refusals; when a waiting job will start is foretold by `prospect.py`.

A tenant at its cap is as slow as its own running jobs, so its own measured rate counts instead.
Unknown to the model: jobs that will come, workers that will come or go, costs that change. An
estimate is as good as the next minute resembles the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker.drain import Drain
from broker.jobs import BAND_SHARES, BANDS, Band

#: Bounds of what a refused caller is told to wait, and what it is told when nothing is known.
LEAST_WAIT_MS = 1_000
MOST_WAIT_MS = 600_000
UNKNOWN_WAIT_MS = 5_000
#: A caller told to come back finds this part of a bound free, if it drains as it did.
_ROOM = 1 / 16
#: Tenants of a band that are looked at (and for a position as many at their cap); more are taken
#: to be like these.
RIVALS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What forecasts for a tenant in a band are made of."""

    now_ms: int
    queue: Drain | None
    tenant: Drain | None
    #: Tenants that may run, per band.
    racing: tuple[int, ...]
    #: The tenant is at its cap.
    parked: bool
    #: The tenant's part of its band: its weight over the weights of all that race in it.
    part: float

    @classmethod
    def from_reply(cls, reply: list[Any], band: Band, default_weight: float) -> Outlook:
        """Decode what `outlook` (broker/lua/_intake.lua) returns."""
        now, queue, tenant, oldest, since, racing, parked, races, weights = reply
        everyone, own, *rivals = (None if raw is None else float(raw) for raw in weights)
        default = default_weight if everyone is None else everyone
        queue_drain, tenant_drain = Drain.unpack(queue), Drain.unpack(tenant)
        return cls(
            now_ms=now,
            queue=queue_drain and queue_drain.seen(now, oldest),
            tenant=tenant_drain and tenant_drain.seen(now, since),
            racing=tuple(racing),
            parked=bool(parked),
            part=part_of_band(
                default if own is None else own,
                [default if weight is None else weight for weight in rivals],
                racing[BANDS.index(band)],
                races=bool(races),
            ),
        )

    def jobs_per_s(self, band: Band) -> float | None:
        """The tenant's expected rate of starts in a band; None when nothing was measured yet."""
        own = self.tenant.jobs_per_s if self.tenant else None
        if self.parked and own:
            return own
        shares = sum(
            BAND_SHARES[each]
            for each, tenants in zip(BANDS, self.racing, strict=True)
            if tenants or each is band
        )
        jobs = self.tenant or self.queue
        if self.queue is None or jobs is None or not self.queue.tokens_per_s:
            return own
        tokens_per_s = self.queue.tokens_per_s * self.part * BAND_SHARES[band] / shares
        return tokens_per_s / max(jobs.tokens / jobs.jobs, 1.0)


def part_of_band(own: float, known: list[float], racing: int, *, races: bool) -> float:
    """A tenant's weight over those of `racing` tenants, of whom some weights are known.

    `races`: the tenant itself is one of them.
    """
    total = sum(known) * max(racing / len(known), 1.0) if known else 0.0
    return own / max(total if races else total + own, own)


def tenant_wait_ms(outlook: Outlook, band: Band, bound: int) -> int:
    """Wait of a tenant whose waiting jobs have reached their bound."""
    own = outlook.tenant.jobs_per_s if outlook.tenant else None
    rate = own if outlook.parked else max(own or 0.0, outlook.jobs_per_s(band) or 0.0)
    return _wait_ms(max(1.0, bound * _ROOM), rate)


def queue_wait_ms(outlook: Outlook, waiting: int, mark: int) -> int:
    """Wait for a queue with too many waiting jobs to come below a mark."""
    rate = outlook.queue.jobs_per_s if outlook.queue else None
    return _wait_ms(waiting - mark + max(1.0, mark * _ROOM), rate)


def _wait_ms(jobs: float, rate: float | None) -> int:
    if not rate:
        return UNKNOWN_WAIT_MS
    return round(min(max(jobs / rate * 1000, LEAST_WAIT_MS), MOST_WAIT_MS))
