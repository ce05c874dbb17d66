"""Penalties and biases against their definitions."""

from __future__ import annotations

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from workers.admission import Sampling
from workers.engines.shaping import shape

PROMPT, ANSWER = [1, 2, 2], [2, 5, 5, 5]


def _shaped(**changes: object) -> torch.Tensor:
    scores = torch.linspace(-2, 2, 8)
    shape(scores, Sampling(**changes), PROMPT, ANSWER)  # type: ignore[arg-type]
    return scores - torch.linspace(-2, 2, 8)


def test_repetition_is_that_of_generate() -> None:
    scores = torch.linspace(-2, 2, 8)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([PROMPT + ANSWER]), scores.clone().unsqueeze(0)
    )[0]
    shape(scores, Sampling(repetition_penalty=1.3), PROMPT, ANSWER)
    assert torch.equal(scores, expected)


def test_presence_and_frequency_count_the_answer_only() -> None:
    changed = _shaped(presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.zeros(8)
    expected[2], expected[5] = -0.75, -1.25
    torch.testing.assert_close(changed, expected)


def test_a_bias_is_added() -> None:
    changed = _shaped(logit_bias=((0, 100.0), (7, -3.0)))
    expected = torch.zeros(8)
    expected[0], expected[7] = 100.0, -3.0
    torch.testing.assert_close(changed, expected)
