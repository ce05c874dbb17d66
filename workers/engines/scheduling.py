"""Bounds how long a step may take while answers are being generated.

A long prompt is taken in parts that are small enough for the answers beside it to go on without a
pause; `workers.engines.pacing` works out how small. Of what a step has for prompts the oldest gets
half at least; the rest goes to the shortest, which needn't wait for a long one to be through.
"""

from __future__ import annotations

import time
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from workers.engines.pacing import Pace, price

NAME = "bounded"
#: Part of a step's prompt work that is the oldest prompt's.
_OLDEST = 0.5
#: Prompt work of every step, however little time there is: or prompts would take for ever, and the
#: places of a batch fill too slowly.
_LEAST_WORK = 64.0
#: A smaller part costs about as much as this one.
_LEAST_TOKENS = 16


class BoundedScheduler(FIFOScheduler):  # type: ignore[misc]
    """First come, first served, with as much of prompts a step as `pace` allows beside answers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pace = Pace()
        #: Most tokens of a prompt in the step at hand, by request.
        self._parts: dict[str, int] = {}
        #: Whether the step at hand has answers, and its prompt work.
        self._answers = False
        self._work = 0.0
        #: When the step before was scheduled; None when there was nothing to learn from it.
        self._begun_s: float | None = None

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        now = time.perf_counter()
        # Where requests are at work the loop hasn't waited for new ones since.
        if self._begun_s is not None and self.active_requests:
            self.pace.observe(self._work, now - self._begun_s)
        self._answers, self._work = False, 0.0
        scheduled = super().schedule_batch(token_budget, cache_budget)
        self._begun_s = now if scheduled[0] and self._answers else None
        return scheduled

    def _process_candidates(
        self,
        candidates: list[Any],
        token_budget: int,
        cache_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> Any:
        answers = [each for each in candidates if each.status == RequestStatus.DECODING]
        prompts = [each for each in candidates if each.status != RequestStatus.DECODING]
        self._answers = bool(answers)
        self._parts = {}
        places = min(token_budget, self.max_requests_per_batch) - len(answers)
        if answers and prompts and places > 0:
            self._parts = self._share(prompts, places, request_ids_to_remove_from_waiting)
            candidates = answers + [each for each in prompts if each.request_id in self._parts]
            token_budget = min(token_budget, len(answers) + sum(self._parts.values()))
        return super()._process_candidates(
            candidates, token_budget, cache_budget, request_ids_to_remove_from_waiting
        )

    def _share(self, prompts: list[Any], places: int, found: set[str]) -> dict[str, int]:
        """Tokens of each prompt that come into a step with answers; the first is the oldest."""
        room = max(_LEAST_WORK, self.pace.work())
        oldest, *others = prompts
        others.sort(key=lambda each: len(each.remaining_prefill_tokens))
        wanted, each_costs = self._lot(oldest, found)
        # At the end the oldest gets what the others have left of theirs.
        rest = room - min(room * _OLDEST, wanted * each_costs)
        parts: dict[str, int] = {}
        for state in others[: places - 1]:
            # Before its shared beginning is looked for, which takes time.
            if rest < min(_LEAST_TOKENS, len(state.remaining_prefill_tokens)):
                break
            length, costs = self._lot(state, found)
            part = min(length, int(rest / costs))
            if part < min(_LEAST_TOKENS, length):
                break
            parts[state.request_id] = part
            rest -= part * costs
            room -= part * costs
        parts[oldest.request_id] = min(wanted, max(_LEAST_TOKENS, int(room / each_costs)))
        return parts

    def _lot(self, state: Any, found: set[str]) -> tuple[int, float]:
        """Tokens left of a prompt, less what it shares with others, and the work of each."""
        tokens = self._infer_request_tokens(state, found)
        return len(tokens), price(state.position_offset)

    def _schedule_request(
        self, state: Any, request_tokens: list[int], token_budget: int, found: set[str]
    ) -> None:
        part = self._parts.get(state.request_id, token_budget)
        is_prompt = state.status != RequestStatus.DECODING
        super()._schedule_request(state, request_tokens, min(part, token_budget), found)
        if is_prompt:
            self._work += len(state.tokens_to_process) * price(state.position_offset)


def register() -> None:
    """Make the scheduler known to transformers as `NAME`."""
    SCHEDULER_MAPPING[NAME] = BoundedScheduler
