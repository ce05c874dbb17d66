"""Batches of similar length, the oldest input among them."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from workers.engines.bucketing import Inputs, WaitingInputs, next_batch


def _waiting(*requests: list[int]) -> deque[WaitingInputs]:
    """Requests whose inputs have the given lengths."""
    return deque(
        WaitingInputs(f"job_{number}", Inputs([[0] * length for length in lengths]))
        for number, lengths in enumerate(requests)
    )


def _taken(waiting: deque[WaitingInputs], tokens: int) -> list[tuple[str, int]]:
    return [(piece.owner.request_id, piece.index) for piece in next_batch(waiting, tokens)]


def test_neighbours_in_length_go_together() -> None:
    waiting = _waiting([10], [100], [11], [9])
    assert _taken(waiting, 60) == [("job_3", 0), ("job_0", 0), ("job_2", 0)]
    assert _taken(waiting, 60) == [("job_1", 0)]
    assert not waiting
    assert _taken(waiting, 60) == []


def test_a_large_request_does_not_keep_a_small_one_out() -> None:
    waiting = _waiting([5] * 1000, [5])
    assert ("job_1", 0) in _taken(waiting, 50)
    assert len(waiting) == 1


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), max_size=8),
    st.integers(1, 120),
)
def test_everything_is_taken_once_and_within_bounds(requests: list[list[int]], tokens: int) -> None:
    waiting = _waiting(*requests)
    everything = []
    while waiting:
        oldest = waiting[0]
        batch = next_batch(waiting, tokens)
        assert any(piece.owner is oldest for piece in batch)
        longest = max(len(piece.tokens) for piece in batch)
        assert len(batch) == 1 or longest * len(batch) <= tokens
        everything += [(piece.owner.request_id, piece.index) for piece in batch]
    wanted = {(f"job_{n}", i) for n, lengths in enumerate(requests) for i in range(len(lengths))}
    assert len(everything) == len(wanted)
    assert set(everything) == wanted
