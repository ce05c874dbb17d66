"""How fast jobs run; kept by each completion in constant time, in Redis by `lua/complete.lua`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from struct import Struct

from broker.fairness import MEMORY

#: What is left of the peak when the next job completes: half of it after about 350.
PEAK_MEMORY = 511 / 512
#: Of what a queue's slots make together it gets so much done: between two jobs a slot is empty for
#: a moment.
_USE = 0.95
_SUMS = Struct("<3d")


@dataclass(frozen=True, slots=True)
class Pace:
    #: Sums over about the last 32 jobs: tokens, and how long they ran.
    tokens: float = 0.0
    spent_ms: float = 0.0
    #: Most jobs that ran side by side lately.
    peak: float = 0.0

    @classmethod
    def unpack(cls, raw: bytes | None) -> Pace:
        """As the scripts keep it."""
        return cls(*_SUMS.unpack(raw)) if raw else cls()

    def pack(self) -> bytes:
        return _SUMS.pack(self.tokens, self.spent_ms, self.peak)

    @property
    def slot_tokens_per_s(self) -> float:
        """What one running job gets done; infinite while hardly any time was seen."""
        return self.tokens / self.spent_ms * 1000 if self.spent_ms >= 1 else inf

    def together(self, running: int) -> float:
        """Tokens/s of a queue whose slots are full, with so many running now; 0 when unknown."""
        rate = self.slot_tokens_per_s
        return max(self.peak, running) * rate * _USE if rate < inf else 0.0

    def after(self, tokens: float, ran_ms: float, running: int) -> Pace:
        """After a job that ran beside others, `running` with it."""
        return Pace(
            self.tokens * MEMORY + tokens,
            self.spent_ms * MEMORY + ran_ms,
            max(self.peak * PEAK_MEMORY, running),
        )
