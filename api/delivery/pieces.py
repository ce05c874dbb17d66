"""The answers of a job that has several, or logprobs, over attempts that may start from nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from api.delivery.following import Snapshot
from api.delivery.relay import DivergedError
from broker.jobs import Event, EventType
from broker.pieces import TokenLogprob, pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one answer."""

    #: Number of the answer.
    answer: int
    text: str
    #: Of the tokens that begin in it; empty where none are wanted.
    logprobs: list[TokenLogprob]
    #: Characters of the answer before it.
    offset: int = 0


@dataclass(slots=True)
class _Answer:
    #: Text and logprobs that were sent.
    sent: str = ""
    tokens: int = 0
    #: How far the attempt at hand has come with both.
    at: int = 0
    tokens_at: int = 0


class PieceRelay:
    """As `TextRelay`, for each answer: turns what comes into what still has to be sent."""

    def __init__(self) -> None:
        self._answers: defaultdict[int, _Answer] = defaultdict(_Answer)
        #: Attempt that the pieces come from.
        self._attempt = 0

    def take(self, item: Event | Snapshot) -> list[Piece]:
        """The new pieces in an event. Raises `DivergedError`."""
        if isinstance(item, Snapshot):
            self._again(item.attempt)
        elif item.type is not EventType.DELTA or item.attempt < self._attempt:
            return []
        elif item.attempt > self._attempt:
            self._again(item.attempt)
        said = (Piece(*each) for each in pieces(item.text))
        return self._fresh(said)

    def complete(self, whole: Iterable[Piece]) -> list[Piece]:
        """What is missing up to the whole answers, one piece each. Raises `DivergedError`."""
        self._again(self._attempt)
        return self._fresh(whole)

    def _again(self, attempt: int) -> None:
        """What comes now starts from nothing."""
        self._attempt = attempt
        for answer in self._answers.values():
            answer.at = answer.tokens_at = 0

    def _fresh(self, said: Iterable[Piece]) -> list[Piece]:
        fresh = []
        for piece in said:
            answer = self._answers[piece.answer]
            known = answer.sent[answer.at : answer.at + len(piece.text)]
            if not piece.text.startswith(known):
                raise DivergedError
            text = piece.text[len(known) :]
            skipped = max(0, answer.tokens - answer.tokens_at)
            logprobs = piece.logprobs[skipped:]
            answer.at += len(piece.text)
            answer.tokens_at += len(piece.logprobs)
            answer.tokens = max(answer.tokens, answer.tokens_at)
            if text or logprobs:
                fresh.append(Piece(piece.answer, text, logprobs, len(answer.sent)))
                answer.sent += text
        return fresh


def shown_pieces(text: str) -> list[dict[str, Any]]:
    """The pieces in a text, as the events of a job show them."""
    return [
        {"index": answer, "text": said, **({"logprobs": logprobs} if logprobs else {})}
        for answer, said, logprobs in pieces(text)
    ]
