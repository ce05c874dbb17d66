"""How fast a queue, or one tenant of it, gets its jobs done.

Kept by each completion in constant time: fading sums of jobs, of tokens and of the time in which
there was work, and when they were last brought up to date. Their quotient is a mean over about
the last minute of work; hours without work don't make a queue look slow. `lua/complete.lua` does
the same arithmetic in Redis.

There was work since the job that ends was put in, or since the completion before it, whichever is
later. That is exact while jobs queue up, and too short while only few run side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from struct import Struct

#: What was done this long (of work) ago counts 1/e.
FADING_MS = 60_000
#: Four doubles; numbers as text would take the scripts several times longer.
_SUMS = Struct("<4d")


@dataclass(frozen=True, slots=True)
class Drain:
    jobs: float
    tokens: float
    busy_ms: float
    #: When the sums were brought up to date.
    at_ms: int

    @classmethod
    def unpack(cls, raw: bytes | None) -> Drain | None:
        """As the scripts keep it."""
        if not raw:
            return None
        jobs, tokens, busy, at = _SUMS.unpack(raw)
        return cls(jobs, tokens, busy, int(at))

    def pack(self) -> bytes:
        return _SUMS.pack(self.jobs, self.tokens, self.busy_ms, self.at_ms)

    @property
    def jobs_per_s(self) -> float | None:
        """None while hardly any time was seen."""
        return self.jobs / self.busy_ms * 1000 if self.busy_ms >= 1 else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.busy_ms * 1000 if self.busy_ms >= 1 else None

    def seen(self, now: int, since: int) -> Drain:
        """The same later, with work since `since` and nothing done meanwhile."""
        passed = max(now - max(self.at_ms, since), 0)
        left = math.exp(-passed / FADING_MS)
        return Drain(
            self.jobs * left,
            self.tokens * left,
            self.busy_ms * left + FADING_MS * (1 - left),
            max(now, self.at_ms),
        )


def drained(drain: Drain | None, now: int, since: int, tokens: float) -> Drain:
    """After a completion at `now` of a job that waited since `since` and took `tokens`."""
    seen = (drain or Drain(0.0, 0.0, 0.0, since)).seen(now, since)
    return Drain(seen.jobs + 1, seen.tokens + tokens, seen.busy_ms, seen.at_ms)
