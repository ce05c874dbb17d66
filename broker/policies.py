"""What a tenant may take: its weight in the fair share and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from broker.jobs import BANDS, Band
from broker.limits import NO_LIMITS, RateLimits
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
    #: Of all models together; 0 is without a bound.
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    #: Jobs of all models that are accepted and not terminal; 0 is without a bound.
    max_jobs: int = 0
    #: Band of a job that names none; used by the front, not by the queue.
    default_band: Band = Band.INTERACTIVE
    #: Whether answers may be had with their logprobs, which tell much of a model; used by the
    #: front, not by the queue.
    allow_logprobs: bool = False

    @property
    def limits(self) -> RateLimits:
        """What travels with each job of the tenant."""
        if not (self.requests_per_minute or self.tokens_per_minute or self.max_jobs):
            return NO_LIMITS
        return RateLimits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_jobs=self.max_jobs,
        )
