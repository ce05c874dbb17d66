"""Cuts waiting inputs into batches of similar length. Free of torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from workers.engine import EngineResult

#: Inputs looked at when a batch is put together.
WINDOW = 256


@dataclass(frozen=True, slots=True)
class Inputs:
    """Token ids of a request's inputs, with the marks the model was trained with."""

    tokens: Sequence[list[int]]
    #: For pairs, where the second text of each input begins.
    seconds: Sequence[int] = ()


@dataclass(eq=False, slots=True)
class WaitingInputs:
    """A request with one or more inputs, each of which may go into another batch."""

    request_id: str
    inputs: Inputs
    body: Mapping[str, Any] = field(default_factory=dict)
    future: Future[EngineResult] = field(default_factory=Future)
    #: What was computed, by index of the input.
    outputs: dict[int, Any] = field(default_factory=dict)
    #: Indices of the inputs that are in no batch yet.
    open: dict[int, None] = field(init=False)

    def __post_init__(self) -> None:
        self.open = dict.fromkeys(range(len(self.inputs.tokens)))

    @property
    def open_tokens(self) -> int:
        return sum(len(self.inputs.tokens[index]) for index in self.open)

    @property
    def tokens(self) -> int:
        """Of all inputs together."""
        return sum(map(len, self.inputs.tokens))


@dataclass(frozen=True, slots=True)
class Piece:
    """One input of a request."""

    owner: WaitingInputs
    index: int

    @property
    def tokens(self) -> list[int]:
        return self.owner.inputs.tokens[self.index]

    @property
    def second(self) -> int:
        """Where the second text begins; 0 when there is none."""
        seconds = self.owner.inputs.seconds
        return seconds[self.index] if seconds else 0


def next_batch(waiting: deque[WaitingInputs], batch_tokens: int) -> list[Piece]:
    """Take a batch off the waiting requests: inputs of similar length, the oldest among them.

    Its tokens, padding included, stay within `batch_tokens`, unless one input alone has more.
    """
    window = _window(waiting)
    if not window:
        return []
    oldest = window[0]
    window.sort(key=lambda piece: len(piece.tokens))
    low = high = window.index(oldest)
    # Shorter ones first: they cost no padding to those that are in already.
    while low > 0 and _fits(window[low - 1 : high + 1], batch_tokens):
        low -= 1
    while high + 1 < len(window) and _fits(window[low : high + 2], batch_tokens):
        high += 1
    batch = window[low : high + 1]
    for piece in batch:
        del piece.owner.open[piece.index]
        if not piece.owner.open:
            waiting.remove(piece.owner)
    return batch


def _fits(batch: list[Piece], batch_tokens: int) -> bool:
    return len(batch) * len(batch[-1].tokens) <= batch_tokens


def _window(waiting: deque[WaitingInputs]) -> list[Piece]:
    """Up to `WINDOW` open inputs, one of each request in turn, the oldest request's first."""
    pieces: list[Piece] = []
    turns = [(request, iter(list(request.open))) for request in waiting]
    while turns and len(pieces) < WINDOW:
        kept = []
        for request, indices in turns:
            index = next(indices, None)
            if index is not None:
                pieces.append(Piece(request, index))
                kept.append((request, indices))
        turns = kept
    return pieces[:WINDOW]
