"""When a child that ended may start again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Backoff:
    """Exponential pauses with jitter; a child that ran long enough starts from the first again."""

    first_s: float = 0.3
    factor: float = 2.0
    longest_s: float = 30.0
    #: A run of at least this long counts as healthy.
    stable_s: float = 30.0
    #: In [0, 1): spreads children that died of the same cause.
    chance: Callable[[], float] = random.random
    #: Ends in a row without a healthy run between them.
    failures: int = 0

    def after(self, ran_s: float) -> float:
        """The pause before the next start, now that a run of `ran_s` seconds ended."""
        if ran_s >= self.stable_s:
            self.failures = 0
        pause = min(self.longest_s, self.first_s * self.factor**self.failures)
        self.failures += 1
        return pause * (0.5 + 0.5 * self.chance())
