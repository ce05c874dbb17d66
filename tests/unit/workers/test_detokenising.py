"""Tokens into text, never half a character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from workers.engines.detokenising import Detokeniser


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    detokeniser = Detokeniser(tokenizer)
    tokens = tokenizer.encode("a😀b").ids
    assert len(tokens) == 6
    assert [detokeniser.push([token]) for token in tokens] == ["a", "", "", "", "😀", "b"]
    assert detokeniser.finish() == ""
    assert detokeniser.count == 6


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    detokeniser = Detokeniser(tokenizer)
    tokens = tokenizer.encode("ä😀").ids[:-1]
    assert detokeniser.push(tokens[:2]) == "ä"
    assert detokeniser.push(tokens[2:]) == ""
    assert detokeniser.finish() == "\ufffd"


def test_control_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    detokeniser = Detokeniser(tokenizer)
    assert detokeniser.push([*tokenizer.encode("hi").ids, 257]) == "hi"
    assert detokeniser.finish() == ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20), cuts=st.lists(st.integers(0, 60), max_size=6))
@pytest.mark.usefixtures("tokenizer")
def test_pieces_add_up(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = tokenizer.encode(text).ids
    detokeniser = Detokeniser(tokenizer)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    pieces = [detokeniser.push(tokens[low:high]) for low, high in pairwise(bounds)]
    assert "".join(pieces) + detokeniser.finish() == tokenizer.decode(tokens)
