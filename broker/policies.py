"""What a tenant may take: its weight in the fair share and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from broker.jobs import BANDS, Band
from config.settings import Queue as QueueSettings


def shedding_marks(settings: QueueSettings) -> dict[Band, int]:
    """Waiting jobs of a queue from which on new ones of a band are refused; highest band first."""
    parts = (settings.shed_interactive_at, settings.shed_standard_at, settings.shed_batch_at)
    return {
        band: ceil(settings.max_queued_total * part)
        for band, part in zip(BANDS, parts, strict=True)
    }


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
