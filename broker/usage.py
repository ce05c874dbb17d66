"""What tenants used, by hour and model.

Counted by the script that ends a job (`tally` in `lua/_prelude.lua`), so once for each end: a job
that is put in again after it failed ends twice. Kept for eight days, as a hash per tenant and day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from struct import Struct
from typing import Any

from broker.jobs import Status, Usage

HOUR_MS = 3_600_000
#: Hours that can be asked for: a week.
MOST_HOURS = 168
#: How long a day is kept after the last hour in which something began to be counted.
KEPT_S = 8 * 86_400
#: Four counts of jobs, three sums of tokens.
_SUMS = Struct("<4I3d")


@dataclass(frozen=True, kw_only=True, slots=True)
class HourUsage:
    """Of one tenant, in one hour (UTC), with one model."""

    #: Beginning of the hour (Unix milliseconds).
    hour_ms: int
    model: str
    #: Jobs by how they ended.
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    #: Of ended jobs, whatever their end.
    input_tokens: int = 0
    #: Part of the input tokens.
    cached_tokens: int = 0
    output_tokens: int = 0

    def with_end(self, status: Status, usage: Usage) -> HourUsage:
        """With one more job that ended."""
        ends: dict[str, Any] = {status.value: getattr(self, status.value) + 1}
        return replace(
            self,
            **ends,
            input_tokens=self.input_tokens + usage.input_tokens,
            cached_tokens=self.cached_tokens + usage.cached_tokens,
            output_tokens=self.output_tokens + usage.output_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantUsage:
    #: Beginning of the first hour, and the moment of the reading (Unix milliseconds).
    since_ms: int
    until_ms: int
    #: Hours and models with an end, by hour and model.
    hours: tuple[HourUsage, ...]


def since(now_ms: int, hours: int) -> int:
    """Beginning of the first of so many hours, the last of which is the running one."""
    return (now_ms // HOUR_MS - hours + 1) * HOUR_MS


def from_reply(now_ms: int, days: Sequence[bytes], hours: int, model: str | None) -> TenantUsage:
    """From what `lua/usage.lua` returns: `<hour>|<model>` and packed sums in turn."""
    first = since(now_ms, hours)
    found = []
    for name, sums in zip(days[::2], days[1::2], strict=True):
        hour, _, its_model = name.decode().partition("|")
        hour_ms = int(hour) * HOUR_MS
        if hour_ms >= first and model in (None, its_model):
            found.append(_unpack(hour_ms, its_model, sums))
    return reading(first, now_ms, found)


def reading(since_ms: int, until_ms: int, hours: Sequence[HourUsage]) -> TenantUsage:
    ordered = tuple(sorted(hours, key=lambda each: (each.hour_ms, each.model)))
    return TenantUsage(since_ms=since_ms, until_ms=until_ms, hours=ordered)


def _unpack(hour_ms: int, model: str, sums: bytes) -> HourUsage:
    completed, failed, cancelled, expired, *tokens = _SUMS.unpack(sums)
    taken, cached, made = map(int, tokens)
    return HourUsage(
        hour_ms=hour_ms,
        model=model,
        completed=completed,
        failed=failed,
        cancelled=cancelled,
        expired=expired,
        input_tokens=taken,
        cached_tokens=cached,
        output_tokens=made,
    )
