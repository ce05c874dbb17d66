"""What is refused before it reaches the engine, and with which parameter named."""

from __future__ import annotations

import pytest

from workers.admission import Limits, admit_generation, admit_prompt
from workers.engine import EngineError

LIMITS = Limits(context_tokens=100, output_tokens=40, cache_tokens=80, vocabulary=1000)


def _refusal(body: dict[str, object], prompt_tokens: int = 10) -> tuple[str, str | None]:
    with pytest.raises(EngineError) as refused:
        admit_generation(body, prompt_tokens, LIMITS, param="messages")
    return refused.value.code, refused.value.param


def test_defaults_fill_what_the_prompt_leaves() -> None:
    short = admit_generation({}, 10, LIMITS, param="prompt")
    long = admit_generation({}, 70, LIMITS, param="prompt")
    assert (short.max_tokens, long.max_tokens) == (40, 10)
    assert short.stop == ()
    assert (short.sampling.temperature, short.sampling.top_p, short.sampling.top_k) == (1, 1, 0)


def test_prompt_and_answer_must_fit_context_and_cache() -> None:
    assert _refusal({"max_tokens": 1}, 80) == ("context_length_exceeded", "messages")
    assert _refusal({"max_tokens": 31}, 50) == ("context_length_exceeded", "messages")
    assert admit_generation({"max_tokens": 30}, 50, LIMITS, param="prompt").max_tokens == 30


@pytest.mark.parametrize("value", [0, -1, 41, 10**9, "8", True, 1.5])
def test_max_tokens_out_of_bounds(value: object) -> None:
    assert _refusal({"max_tokens": value}) == ("invalid_request", "max_tokens")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("top_p", "1"),
        ("top_k", -1),
        ("top_k", 0.5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    assert _refusal({name: value}) == ("invalid_request", name)


@pytest.mark.parametrize(
    ("body", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"top_k": 1}, True),
        ({"top_p": 0}, True),
        ({"temperature": 0.1}, False),
        ({}, False),
    ],
)
def test_greedy(body: dict[str, object], greedy: bool) -> None:
    assert admit_generation(body, 1, LIMITS, param="prompt").sampling.greedy is greedy


def test_one_stop_string_may_come_alone() -> None:
    assert admit_generation({"stop": "\n"}, 1, LIMITS, param="prompt").stop == ("\n",)


@pytest.mark.parametrize("tokens", [[], [1000], [-1], [5, 10**9]])
def test_prompts_that_would_end_the_loop(tokens: list[int]) -> None:
    with pytest.raises(EngineError) as refused:
        admit_prompt(tokens, LIMITS, param="prompt")
    assert (refused.value.code, refused.value.param) == ("invalid_request", "prompt")


def test_a_prompt_within_the_vocabulary() -> None:
    admit_prompt([0, 999], LIMITS, param="prompt")


def test_sampling_that_is_not_named_is_the_model_s() -> None:
    limits = Limits(context_tokens=100, output_tokens=40, temperature=0.2, top_p=0.9)
    silent = admit_generation({}, 1, limits, param="prompt").sampling
    assert (silent.temperature, silent.top_p) == (0.2, 0.9)
    named = admit_generation({"temperature": 0, "top_p": 1}, 1, limits, param="prompt").sampling
    assert (named.temperature, named.top_p) == (0, 1)
