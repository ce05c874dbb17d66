"""Draws against the distribution that temperature, top_k and top_p define."""

from __future__ import annotations

import pytest
import torch

from workers.admission import Sampling
from workers.engines.sampling import draw, raise_drawn

VOCABULARY = 600
DRAWS = 6_000


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20240607)


def _scores() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


def _expected(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By transformers' own warpers, in the order in which `generate` applies them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores.unsqueeze(0))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0].softmax(dim=-1)


CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_p=0.9),
    Sampling(top_p=0.05),
    Sampling(temperature=1.7, top_p=0.5),
    Sampling(top_k=5),
    Sampling(top_k=10_000),
    Sampling(temperature=0.7, top_k=40, top_p=0.8),
]


def _check(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    assert counts[expected == 0].sum() == 0
    # Chi-squared over the tokens seen often enough, the rest taken together.
    wanted = expected.double() * len(tokens)
    often = wanted >= 5
    rest = (counts[~often].sum(), wanted[~often].sum())
    statistic = ((counts - wanted)[often] ** 2 / wanted[often]).sum()
    if rest[1] > 0:
        statistic += (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = int(often.sum()) or 1
    # Five standard deviations of the distribution with that many degrees of freedom.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_on_the_cpu(sampling: Sampling) -> None:
    scores = _scores()
    tokens = draw(scores.repeat(DRAWS, 1), [sampling] * DRAWS)
    _check(tokens, _expected(scores, sampling))


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_by_tensor_operations_alone(sampling: Sampling) -> None:
    scores = _scores()
    raised = raise_drawn(
        scores.repeat(DRAWS, 1),
        torch.full((DRAWS,), sampling.temperature),
        torch.full((DRAWS,), sampling.top_k, dtype=torch.int32),
        torch.full((DRAWS,), sampling.top_p),
    )
    _check(raised.argmax(dim=-1), _expected(scores, sampling))


def test_rows_keep_their_own_parameters() -> None:
    scores = torch.stack([_scores()] * 4)
    scores[:, 7] = scores.max() + 1
    scores[:, 9] = scores.max() + 1
    mixed = [
        Sampling(temperature=0.01),
        Sampling(top_k=1),
        Sampling(top_p=0.01),
        Sampling(temperature=0.01, top_k=2),
    ]
    assert draw(scores, mixed).tolist() == [9, 9, 9, 9]
    assert draw(scores, mixed[::-1]).tolist() == [9, 9, 9, 9]


def test_greedy_rows_are_left_alone() -> None:
    scores = torch.stack([_scores(), _scores()])
    raised = raise_drawn(
        scores.clone(), torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), torch.tensor([1.0, 1.0])
    )
    assert torch.equal(raised[0], scores[0])
    assert raised[1].isinf().sum() == 1
