"""How much of prompts a step may take, learnt from how long steps have taken.

A step's time is modelled as `base + work * rate`. `base` is what the answers cost and is read from
steps without prompts. `work` counts prompt tokens, each worth `1 + before / SPAN_TOKENS`, because
it meets the keys of all `before` it. `rate` follows the machine: a faster one takes larger parts, a
busy one smaller ones, and the answers beside them keep their pace.
"""

from __future__ import annotations

#: Tokens before a part of a prompt whose keys cost as much as all the rest of the model.
SPAN_TOKENS = 2048
#: First guesses, of a small model on two processors; a few steps replace them.
_BASE_S = 0.04
_RATE_S = 0.0006
#: How fast an estimate follows a sample above it, and one below it.
_UP, _DOWN = 0.2, 0.1
#: A single step that was held up says little; it counts as this many times the estimate at most.
_OUTLIER = 2.0
#: Parts smaller than this say more about the noise than about the rate.
_TELLING = 12.0


class Pace:
    """Estimates of one loop; used by its thread only."""

    def __init__(self, target_s: float = 0.12) -> None:
        #: Longest a step with answers in it should take.
        self.target_s = target_s
        self._base_s = _BASE_S
        self._rate_s = _RATE_S

    def work(self) -> float:
        """Prompt work that fits a step beside answers."""
        return max(0.0, self.target_s - self._base_s) / self._rate_s

    def observe(self, work: float, seconds: float) -> None:
        """Learn from a step with answers in it, which did this much prompt work."""
        if not work:
            self._base_s = _follow(self._base_s, seconds)
        elif work >= _TELLING:
            # What is short of the base was not measured, it is the noise of both.
            sample = max(seconds - self._base_s, 0.1 * self._rate_s * work) / work
            self._rate_s = _follow(self._rate_s, sample)


def price(before: int) -> float:
    """Work of one prompt token that has `before` tokens before it."""
    return 1.0 + before / SPAN_TOKENS


def _follow(estimate: float, sample: float) -> float:
    sample = min(sample, _OUTLIER * estimate)
    return estimate + (_UP if sample > estimate else _DOWN) * (sample - estimate)
