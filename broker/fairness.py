"""Who runs next: the specification, in plain Python, of what `lua/claim.lua` does in Redis.

Two choices are made for each start.

*Band.* The highest band with work goes first, but each band owns a share of the tokens. Whenever
c tokens start, every backlogged band is owed its part of them (its share over the shares of all
backlogged bands), and the band that was served has c paid off. A lower band goes before the
highest one as soon as it is owed what its next job costs; a band without work is owed nothing.
What a job took beyond its estimate, or less, is put right in the same way before the next choice.
A band that may start nothing now (its slots are used up) isn't chosen, and owed nothing for what
others start meanwhile; what it was owed before it keeps.

*Tenant.* Start-time fair queueing (Goyal, Vin, Cheng, 1996): each tenant of a band has a virtual
time which a start moves on by cost / weight, and the least virtual time goes first. The band's
clock is the virtual time at which the latest start was made. A tenant that comes back after being
idle or at its cap starts at the clock, unless its own time is still ahead: idling saves up nothing.

Costs are upper bounds (all that may be generated) and often far from what a job takes. A start is
charged its cost times the part of their cost that the tenant's jobs took lately (a newcomer's: the
jobs of all), and `settle` corrects the rest when the real number is known. Without the first, a
newcomer's running jobs would weigh as much as they could ever take, against those of others which
have long been corrected, and it would get one slot at a time; and a tenant that takes less of its
cost than others do would be charged too much each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from broker.jobs import BAND_SHARES, BANDS, Band

#: What is left of a job's part in `ratio` when the next one completes: about the last 32 count.
MEMORY = 31 / 32
#: A job that ran counts as this many tokens at least, so that jobs which take none (or say so)
#: still take turns.
LEAST_TOKENS = 1


@dataclass(slots=True)
class BandState:
    #: Tenant -> virtual time; it has waiting jobs and may run them.
    active: dict[str, float] = field(default_factory=dict)
    #: Tenant -> virtual time of those out of the race, as long as it is ahead of the clock.
    idle: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0
    #: Tokens owed to the band.
    lag: float = 0.0
    #: Tokens its jobs took beyond what their starts were charged, not yet in anybody's lag.
    due: float = 0.0

    def first(self) -> str:
        """The tenant with the least virtual time; ties go by the bytes of the name."""
        return min(self.active, key=lambda tenant: (self.active[tenant], tenant.encode()))


class FairShare:
    """The race of all tenants of one model queue. Not thread-safe."""

    def __init__(self) -> None:
        self.bands: dict[Band, BandState] = {band: BandState() for band in BANDS}
        #: Sums over the jobs completed lately, older ones fading: tokens taken, and their costs.
        self.taken = 0.0
        self.estimated = 0.0
        #: The same of each tenant that had jobs completed lately.
        self.own: dict[str, tuple[float, float]] = {}

    def ratio(self, tenant: str) -> float:
        """The part of their cost that the tenant's jobs take; at most 1."""
        taken, estimated = self.own.get(tenant, (self.taken, self.estimated))
        return min(taken / estimated, 1.0) if estimated > 0 else 1.0

    def join(self, band: Band, tenant: str) -> None:
        """The tenant has waiting jobs in this band and is below its cap."""
        state = self.bands[band]
        state.active[tenant] = max(state.clock, state.idle.pop(tenant, state.clock))

    def leave(self, band: Band, tenant: str) -> None:
        """The tenant has no waiting job left in this band, or is at its cap."""
        state = self.bands[band]
        own = state.active.pop(tenant, None)
        if own is None:
            return
        if own > state.clock:
            state.idle[tenant] = own
        if not state.active:
            state.lag = 0.0

    def balance(self) -> None:
        """Before choices: put into the lags what jobs took beyond their charges, or less."""
        for band, served in self.bands.items():
            if not served.due:
                continue
            racing = [each for each, state in self.bands.items() if state.active or each is band]
            shares = sum(BAND_SHARES[each] for each in racing)
            for each in racing:
                state = self.bands[each]
                if state.active:
                    state.lag += served.due * BAND_SHARES[each] / shares
                    state.lag -= served.due if each is band else 0.0
            served.due = 0.0

    def choose(
        self, head_cost: Callable[[Band, str], int], full: Collection[Band] = ()
    ) -> tuple[Band, str] | None:
        """Band and tenant of the next start; None when nobody may run.

        `head_cost` tells the cost of the oldest waiting job of a tenant in a band; bands in `full`
        may start nothing.
        """
        chosen: Band | None = None
        most = 0.0
        for band in BANDS:
            state = self.bands[band]
            if not state.active or band in full:
                continue
            owed, first = state.lag / BAND_SHARES[band], state.first()
            if chosen is None:
                chosen = band
            elif owed > most and state.lag >= head_cost(band, first) * self.ratio(first):
                chosen, most = band, owed
        return (chosen, self.bands[chosen].first()) if chosen else None

    def start(
        self, band: Band, tenant: str, cost: int, weight: float, full: Collection[Band] = ()
    ) -> float:
        """Charge a start to an active tenant and to its band; returns the tokens charged."""
        charge = cost * self.ratio(tenant)
        backlogged = [
            (each, state) for each, state in self.bands.items() if state.active and each not in full
        ]
        shares = sum(BAND_SHARES[each] for each, _ in backlogged)
        for each, state in backlogged:
            state.lag += charge * BAND_SHARES[each] / shares
        state = self.bands[band]
        state.lag -= charge
        state.clock = max(state.clock, state.active[tenant])
        state.active[tenant] += charge / weight
        return charge

    def settle(self, band: Band, tenant: str, taken: float, charged: float, weight: float) -> None:
        """Correct what a start was charged: the job really took `taken` tokens.

        A refund reaches below the clock by no more than the job took: the charge may have let
        others in first, and they must not be held up by giving it all back. Not at all below it
        would take from those whose jobs vary: what their long jobs take beyond the estimate is
        charged in full. A tenant out of the race saves up nothing.
        """
        state, tokens = self.bands[band], taken - charged
        state.due += tokens
        if not tokens:
            return
        if tenant in state.active:
            own = state.active[tenant]
            least = min(own, state.clock - taken / weight)
            state.active[tenant] = max(least, own + tokens / weight)
        else:
            own = max(state.clock, state.idle.get(tenant, state.clock))
            to = max(state.clock, own + tokens / weight)
            if tenant in state.idle or to > state.clock:
                state.idle[tenant] = to

    def learn(self, tenant: str, cost: int, taken: int) -> None:
        """Take account of a completed job's cost and of what it took."""
        self.taken = self.taken * MEMORY + taken
        self.estimated = self.estimated * MEMORY + cost
        before, expected = self.own.get(tenant, (0.0, 0.0))
        self.own[tenant] = (before * MEMORY + taken, expected * MEMORY + cost)
