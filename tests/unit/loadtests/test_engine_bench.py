"""Rounds of the engine benchmark share no prompt, and a failed chat spoils the run."""

from __future__ import annotations

import json

import pytest

from loadtests.engine_bench import CHATS, ROUNDS, _completion_tokens, prompts
from loadtests.harness import BenchError
from loadtests.http_load import Answer


def test_no_two_prompts_of_a_run_begin_alike() -> None:
    texts = [text for number in range(ROUNDS + 1) for text in prompts(number)]
    first_words = [text.split(maxsplit=1)[0] for text in texts]
    assert len(set(first_words)) == (ROUNDS + 1) * CHATS


def test_tokens_are_those_the_server_counted() -> None:
    body = json.dumps({"usage": {"completion_tokens": 48}}).encode()
    assert _completion_tokens(Answer(status=200, body=body, latency_s=1.0)) == 48


def test_a_refused_chat_spoils_the_run() -> None:
    with pytest.raises(BenchError, match="503"):
        _completion_tokens(Answer(status=503, body=b"{}", latency_s=1.0))
