"""How much of a prompt goes into a step beside answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from workers.engines.scheduling import CHUNK_TOKENS, BoundedScheduler, chunk_tokens


def test_parts_shrink_as_their_keys_grow() -> None:
    sizes = [chunk_tokens(before) for before in range(0, 20_000, 100)]
    assert sizes[0] == CHUNK_TOKENS
    assert sizes == sorted(sizes, reverse=True)
    # About the same work in every part, and always some progress.
    assert chunk_tokens(6000) < CHUNK_TOKENS / 4
    assert sizes[-1] == 16


@pytest.mark.parametrize(
    ("active", "budget"),
    [
        ([], 512),
        ([(RequestStatus.PREFILLING, 300)], 512),
        ([(RequestStatus.DECODING, 900)] * 3, 3 + CHUNK_TOKENS),
        ([(RequestStatus.DECODING, 9)] * 3 + [(RequestStatus.PREFILLING, 1536)], 3 + 56),
    ],
)
def test_only_answers_bound_a_step(
    monkeypatch: pytest.MonkeyPatch, active: list[tuple[Any, int]], budget: int
) -> None:
    given: list[int] = []
    monkeypatch.setattr(
        FIFOScheduler, "schedule_batch", lambda _, tokens, cache: given.append(tokens)
    )
    scheduler = BoundedScheduler.__new__(BoundedScheduler)
    scheduler.active_requests = {
        str(at): SimpleNamespace(status=status, position_offset=done)
        for at, (status, done) in enumerate(active)
    }
    scheduler.schedule_batch(512, 10_000)
    assert given == [budget]
