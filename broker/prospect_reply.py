"""The view that `lua/position.lua` returns, as a `Prospect`."""

from __future__ import annotations

from typing import Any

from broker.drain import Drain
from broker.forecast import RIVALS
from broker.jobs import BANDS, Band
from broker.pace import Pace
from broker.prospect import BandView, Prospect, Rival, demand, job_tokens, tokens_per_s
from config.settings import Queue as QueueSettings

_B = len(BANDS)


def decode_prospect(reply: list[Any], band: Band, settings: QueueSettings) -> Prospect:
    now, oldest, in_flight, waiting, at, tenants, rows, runs, weights, caps, state = reply
    pace = Pace.unpack(state.pop(1))
    drain, *drains = map(Drain.unpack, state)
    coming, (own, own_coming), theirs = drains[:_B], drains[_B : _B + 2], drains[_B + 2 :]
    running, *rival_runs = (int(raw or 0) for raw in runs)
    default_weight, own_weight, *rival_weights = (
        None if raw is None else float(raw) for raw in weights
    )
    default_cap, own_cap, *rival_caps = (None if raw is None else int(raw) for raw in caps)
    weight = settings.default_weight if default_weight is None else default_weight
    cap = settings.default_max_in_flight if default_cap is None else default_cap
    rivals = [
        Rival(
            at=float(virtual),
            weight=weight if rival_weight is None else rival_weight,
            cap=cap if rival_cap is None else rival_cap,
            waiting=jobs,
            running=runs_now,
            tokens=job_tokens(their, drain),
            count=max(tenants[is_parked] / RIVALS, 1.0),
        )
        for (virtual, jobs, is_parked), runs_now, rival_weight, rival_cap, their in zip(
            zip(*[iter(rows)] * 3, strict=True),
            rival_runs,
            rival_weights,
            rival_caps,
            theirs,
            strict=True,
        )
    ]
    return Prospect(
        now_ms=now,
        band=band,
        tokens_per_s=tokens_per_s(drain, pace, now, oldest, in_flight),
        own_tokens=job_tokens(own, drain),
        mean_tokens=job_tokens(drain),
        slot_tokens_per_s=pace.slot_tokens_per_s,
        bands=[
            BandView(waiting=jobs, demand=demand(each, now))
            for jobs, each in zip(waiting, coming, strict=True)
        ],
        own_demand=demand(own_coming, now),
        at=float(at),
        weight=weight if own_weight is None else own_weight,
        default_weight=weight,
        cap=cap if own_cap is None else own_cap,
        running=running,
        rivals=rivals,
    )
