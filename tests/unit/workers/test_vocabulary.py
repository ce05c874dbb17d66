"""Masks of a grammar over a vocabulary of bytes."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from broker.grammars import Constraint, constraint_of
from workers.engine import EngineError
from workers.engines import vocabulary
from workers.engines.vocabulary import Guide, GuideError, Vocabulary

END = 256
#: More scores than the tokeniser has tokens, as many models have.
SIZE = 300


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    return tokenizer


TOKENIZER = _tokenizer()


@pytest.fixture
def words() -> Vocabulary:
    return Vocabulary(TOKENIZER, SIZE, [END])


def _constraint(**body: Any) -> Constraint:
    found = constraint_of(body)
    assert found is not None
    return found


def _tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def _allowed(guide: Guide, text: str) -> set[str]:
    forbidden = guide.forbidden(_tokens(text))
    assert len(forbidden) == SIZE
    found = (~forbidden).nonzero().flatten().tolist()
    return {"END" if token == END else TOKENIZER.decode([token]) for token in found}


def test_only_what_matches_is_left(words: Vocabulary) -> None:
    guide = words.guide(_constraint(structured_outputs={"regex": "a[bc]{1,2}"}))
    assert _allowed(guide, "") == {"a"}
    assert _allowed(guide, "a") == {"b", "c"}
    assert _allowed(guide, "ac") == {"b", "c", "END"}
    assert _allowed(guide, "acb") == {"END"}


def test_a_grammar_is_walked_by_each_answer_on_its_own(words: Vocabulary) -> None:
    constraint = _constraint(structured_outputs={"choice": ["yes", "no."]})
    first, second = words.guide(constraint), words.guide(constraint)
    assert _allowed(first, "ye") == {"s"}
    assert _allowed(second, "") == {"y", "n"}
    assert _allowed(second, "no") == {"."}


def test_json_is_written_without_free_white_space(words: Vocabulary) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"required": ["a"], "properties": {
        "a": {"type": "boolean"}}, "type": "object", "additionalProperties": False}}}  # fmt: skip
    guide = words.guide(_constraint(response_format=form))
    assert _allowed(guide, "") == {"{"}
    assert _allowed(guide, '{"a": ') == {"t", "f"}
    assert _allowed(guide, '{"a": true}') == {"END"}


def test_an_answer_outside_its_grammar_fails_and_says_which(words: Vocabulary) -> None:
    guide = words.guide(_constraint(structured_outputs={"regex": "abc"}))
    with pytest.raises(GuideError):
        guide.forbidden(_tokens("x"))
    assert guide.failed
    assert guide.refusal.param == "structured_outputs.regex"


def test_an_expression_that_leads_nowhere_ends_its_answer(words: Vocabulary) -> None:
    guide = words.guide(_constraint(structured_outputs={"regex": r"[^\s\S]"}))
    with pytest.raises(GuideError):
        guide.forbidden([])


def test_kept_grammars_are_bounded(words: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_KEPT", 2)
    constraints = [_constraint(structured_outputs={"regex": letter}) for letter in "abc"]
    for constraint in (*constraints[:2], constraints[0], constraints[2]):
        words.guide(constraint)
    assert list(words._compiled) == [constraints[0].grammar, constraints[2].grammar]


def test_a_model_without_an_end_has_no_guides() -> None:
    endless = Vocabulary(TOKENIZER, SIZE, [-1])
    with pytest.raises(EngineError) as refused:
        endless.guide(_constraint(response_format={"type": "json_object"}))
    assert refused.value.code == "unsupported_parameter"


def test_bytes_of_a_token(words: Vocabulary) -> None:
    first, second = _tokens("é")
    assert words.bytes_of(first) + words.bytes_of(second) == "é".encode()
    assert words.bytes_of(END) == b""
