"""A model's tokens as bytes, and the grammars that answers made of them are held to.

Grammars are compiled once for a model and kept; each answer walks its own copy. A copy looks at no
more of the vocabulary than what the tokens so far leave open, so most masks take microseconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from llguidance import LLMatcher, LLTokenizer

from broker.grammars import Constraint, parser_limits
from workers.engine import EngineError

#: Grammars kept; one that was followed for long may hold some 10 MB.
_KEPT = 32


class GuideError(Exception):
    """An answer's grammar can't be followed further."""


class Guide:
    """Where one answer stands in its grammar; used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, constraint: Constraint, size: int) -> None:
        self._matcher = matcher
        self._constraint = constraint
        self._size = size
        self._bits = numpy.zeros(-(-size // 32), dtype=numpy.uint32)
        self._taken = 0
        #: The grammar can't be followed further, and neither can the answer.
        self.failed = False

    def hold(self, scores: torch.Tensor, answer: Sequence[int]) -> None:
        """Make what may not come after `answer` impossible, [token]. Raises `GuideError`."""
        scores.masked_fill_(self.forbidden(answer), -torch.inf)

    def forbidden(self, answer: Sequence[int]) -> torch.Tensor:
        """Which tokens may not come after `answer`, [token]. Raises `GuideError`."""
        for token in answer[self._taken :]:
            self._matcher.consume_token(token)
        self._taken = len(answer)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error() or not self._bits.any():
            self.failed = True
            raise GuideError
        bits = numpy.unpackbits(~self._bits.view(numpy.uint8), count=self._size, bitorder="little")
        return torch.from_numpy(bits.view(numpy.bool_))

    @property
    def refusal(self) -> EngineError:
        """What to say of an answer that failed."""
        return EngineError(
            "invalid_request", "it is too complex to be followed", self._constraint.param
        )


class Vocabulary:
    """Of one model. Thread-safe."""

    def __init__(self, tokenizer: Any, size: int, ends: Iterable[int]) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; a model without an end token has no guides."""
        self._size = size
        self._ends = sorted(end for end in ends if end >= 0)
        self._tokens = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=self._ends or None)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; nothing for control tokens."""
        if self._tokens.is_special_token(token):
            return b""
        return bytes(self._tokens.decode_bytes([token]))

    def guide(self, constraint: Constraint) -> Guide:
        """For one new answer. Raises `EngineError` when the grammar can't be compiled."""
        if not self._ends:
            raise EngineError(
                "unsupported_parameter",
                "this model has no end token, so its answers can't be held to a form",
                constraint.param,
            )
        with self._lock:
            found = self._compiled.get(constraint.grammar)
            if found is not None:
                self._compiled.move_to_end(constraint.grammar)
        if found is None:
            # Outside the lock: it may take a while.
            found = LLMatcher(self._tokens, constraint.grammar, log_level=0, limits=parser_limits())
            if found.is_error():
                raise EngineError("invalid_request", "it can't be followed", constraint.param)
            with self._lock:
                self._compiled[constraint.grammar] = found
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return Guide(found.deep_copy(), constraint, self._size)
