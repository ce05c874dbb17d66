"""What a tenant may take: its weight in the fair share and its bounds."""

from __future__ import annotations

from dataclasses import dataclass

from broker.jobs import Band


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantPolicy:
    #: Share of the tokens relative to other tenants of the same band.
    weight: float = 1.0
    #: Jobs of one model that may run at once.
    max_in_flight: int = 64
    #: Jobs of one model that may wait.
    max_queued: int = 10_000
    #: Band of a job that names none; used by the front, not by the queue.
    default_band: Band = Band.INTERACTIVE
