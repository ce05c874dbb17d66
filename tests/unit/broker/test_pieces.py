"""Answers in pieces."""

from __future__ import annotations

from typing import Any

import pytest

from broker.pieces import completion_logprobs, in_pieces, piece, pieces


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, False),
        ({"n": 1, "logprobs": False}, False),
        ({"n": 2}, True),
        ({"logprobs": True}, True),
        ({"logprobs": 0}, True),
    ],
)
def test_which_bodies_have_pieces(body: dict[str, Any], expected: bool) -> None:
    assert in_pieces(body) is expected


def test_pieces_are_read_as_written() -> None:
    said = [(0, "one\n\u2028 two", []), (3, "", [{"token": "é", "logprob": -1.5}])]
    assert list(pieces("".join(piece(*each) for each in said))) == said
    assert list(pieces("")) == []


def test_offsets_of_a_completion_count_characters() -> None:
    def entry(raw: bytes) -> dict[str, Any]:
        token = raw.decode(errors="replace")
        return {"token": token, "logprob": -1.0, "bytes": list(raw), "top_logprobs": []}

    halves = [entry(b"a"), entry(b"\xc3"), entry(b"\xa9"), entry(b"bc"), entry(b"d")]
    found = completion_logprobs(halves, 10)
    assert found is not None
    assert found["text_offset"] == [10, 11, 11, 12, 14]
    assert found["tokens"][0] == "a"
    assert completion_logprobs(None) is None
