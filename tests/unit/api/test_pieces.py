"""Several answers, or logprobs, from events that repeat and overlap."""

from __future__ import annotations

from typing import Any

import pytest

from api.delivery.following import Snapshot
from api.delivery.pieces import Piece, PieceRelay, shown_pieces
from api.delivery.relay import DivergedError
from broker.jobs import Event, EventType, Status
from broker.pieces import piece

LOGPROB: dict[str, Any] = {"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}


def _delta(*said: tuple[int, str], attempt: int = 1, logprobs: bool = False) -> Event:
    text = "".join(piece(answer, text, [LOGPROB] * logprobs) for answer, text in said)
    return Event(seq=2, type=EventType.DELTA, attempt=attempt, text=text)


def _texts(found: list[Piece]) -> list[tuple[int, str, int]]:
    return [(each.answer, each.text, each.offset) for each in found]


def test_each_answer_goes_on_where_it_was() -> None:
    relay = PieceRelay()
    assert _texts(relay.take(_delta((0, "a"), (1, "bc")))) == [(0, "a", 0), (1, "bc", 0)]
    assert _texts(relay.take(_delta((1, "d")))) == [(1, "d", 2)]
    whole = [Piece(0, "a end", []), Piece(1, "bcd", [])]
    assert _texts(relay.complete(whole)) == [(0, " end", 1)]


def test_a_new_attempt_says_it_again_in_another_order() -> None:
    relay = PieceRelay()
    relay.take(_delta((0, "one"), (1, "two"), logprobs=True))
    assert relay.take(_delta((1, "two"), attempt=2, logprobs=True)) == []
    fresh = relay.take(_delta((0, "one more"), (1, "!"), attempt=2, logprobs=True))
    assert _texts(fresh) == [(0, " more", 3), (1, "!", 3)]
    # The token of "one" was told of before.
    assert [each.logprobs for each in fresh] == [[], [LOGPROB]]
    assert relay.take(_delta((0, "late"))) == []


def test_what_was_sent_can_not_be_taken_back() -> None:
    relay = PieceRelay()
    relay.take(_delta((0, "one")))
    with pytest.raises(DivergedError):
        relay.take(_delta((0, "two"), attempt=2))


def test_a_snapshot_stands_for_all_before_it() -> None:
    relay = PieceRelay()
    relay.take(_delta((0, "on")))
    text = piece(0, "one", []) + piece(1, "two", [])
    snapshot = Snapshot(seq=9, attempt=1, status=Status.IN_PROGRESS, text=text)
    assert _texts(relay.take(snapshot)) == [(0, "e", 2), (1, "two", 0)]
    assert shown_pieces(text) == [{"index": 0, "text": "one"}, {"index": 1, "text": "two"}]
