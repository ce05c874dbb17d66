"""What tenants used, of the queue in memory; in Redis by `tally` in `lua/_prelude.lua`."""

from __future__ import annotations

from collections import defaultdict

from broker.jobs import Job
from broker.usage import HOUR_MS, KEPT_S, HourUsage, TenantUsage, reading, since


class UsageBook:
    def __init__(self) -> None:
        #: Tenant -> beginning of the hour and model -> sums.
        self._hours: dict[str, dict[tuple[int, str], HourUsage]] = defaultdict(dict)

    def tally(self, job: Job, now: int) -> None:
        """Count a job that has just ended."""
        hours = self._hours[job.tenant]
        for old in [place for place in hours if place[0] < now - KEPT_S * 1000]:
            del hours[old]
        place = now // HOUR_MS * HOUR_MS, job.model
        known = hours.get(place) or HourUsage(hour_ms=place[0], model=job.model)
        hours[place] = known.with_end(job.status, job.usage)

    def read(self, tenant: str, now: int, hours: int, model: str | None) -> TenantUsage:
        first = since(now, hours)
        found = [
            each
            for each in self._hours.get(tenant, {}).values()
            if each.hour_ms >= first and model in (None, each.model)
        ]
        return reading(first, now, found)
