"""The view of `lua/position.lua`, of the queue in memory."""

from __future__ import annotations

from collections.abc import Callable

from broker.forecast import RIVALS
from broker.jobs import BANDS, Band
from broker.memory_state import ModelQueue
from broker.policies import TenantPolicy
from broker.prospect import BandView, Prospect, Rival, demand, job_tokens, tokens_per_s


def prospect_of(
    state: ModelQueue, tenant: str, band: Band, now: int, policy_of: Callable[[str], TenantPolicy]
) -> Prospect:
    race, drain = state.fair.bands[band], state.drains.get(None)
    policy = policy_of(tenant)
    oldest = min((at for since in state.since.values() for at in since.values()), default=now)

    def back(name: str) -> float:
        """Virtual time at which a tenant would come back."""
        return max(race.idle.get(name, race.clock), race.clock)

    ahead = sorted(race.active, key=lambda name: (race.active[name], name.encode()))[:RIVALS]
    parked = sorted(state.parked)[:RIVALS]
    looked_at = [(name, race.active[name], len(race.active)) for name in ahead]
    looked_at += [(name, back(name), len(state.parked)) for name in parked]
    return Prospect(
        now_ms=now,
        band=band,
        tokens_per_s=tokens_per_s(drain, state.pace, now, oldest, len(state.leases)),
        own_tokens=job_tokens(state.drains.get(tenant), drain),
        mean_tokens=job_tokens(drain),
        slot_tokens_per_s=state.pace.slot_tokens_per_s,
        bands=[
            BandView(
                waiting=len(state.since[each]) if state.fair.bands[each].active else 0,
                demand=demand(state.coming.get(each), now),
            )
            for each in BANDS
        ],
        own_demand=demand(state.coming_of.get(tenant), now),
        at=race.active[tenant] if tenant in race.active else back(tenant),
        weight=policy.weight,
        default_weight=policy_of("*").weight,
        cap=policy.max_in_flight,
        running=state.running[tenant],
        rivals=[
            Rival(
                at=at,
                weight=policy_of(name).weight,
                cap=policy_of(name).max_in_flight,
                waiting=len(state.lists[band, name]),
                running=state.running[name],
                tokens=job_tokens(state.drains.get(name), drain),
                count=max(of / RIVALS, 1.0),
            )
            for name, at, of in looked_at
            if name != tenant and (band, name) in state.lists
        ],
    )
