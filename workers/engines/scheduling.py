"""Bounds how long a step may take while answers are being generated.

A long prompt is taken in parts that are small enough for the answers beside it to go on without a
pause. The parts shrink as the prompt grows, because each of its tokens then meets more keys.
"""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

NAME = "bounded"
#: Prompt tokens of a step beside answers that are being generated.
CHUNK_TOKENS = 112
#: Tokens before a part of a prompt whose keys cost as much as the rest of the model.
_SPAN_TOKENS = 1536
#: Below this a part costs its step little more than nothing, and the prompt would take for ever.
_LEAST_TOKENS = 16


class BoundedScheduler(FIFOScheduler):  # type: ignore[misc]
    """First come, first served, with `CHUNK_TOKENS` of prompts a step while anything generates."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        generating = beside = 0
        for state in self.active_requests.values():
            if state.status == RequestStatus.DECODING:
                generating += 1
            else:
                beside = max(beside, state.position_offset)
        if generating:
            token_budget = min(token_budget, generating + chunk_tokens(beside))
        return super().schedule_batch(token_budget, cache_budget)


def chunk_tokens(before: int) -> int:
    """Tokens of the next part of a prompt that has `before` tokens in the cache."""
    return max(_LEAST_TOKENS, CHUNK_TOKENS * _SPAN_TOKENS // (_SPAN_TOKENS + before))


def register() -> None:
    """Make the scheduler known to transformers as `NAME`."""
    SCHEDULER_MAPPING[NAME] = BoundedScheduler
