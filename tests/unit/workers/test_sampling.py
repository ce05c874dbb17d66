"""Draws against the distribution that temperature, top_k and top_p define."""

from __future__ import annotations

import pytest
import torch

from workers.admission import Sampling
from workers.engines.chance import Chance
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
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores.unsqueeze(0))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
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


@pytest.mark.parametrize("left", [3, 40, 400])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.8), Sampling(min_p=0.05)])
def test_draws_among_the_tokens_a_grammar_leaves(sampling: Sampling, left: int) -> None:
    scores = _scores()
    scores[torch.randperm(VOCABULARY)[left:]] = -torch.inf
    tokens = draw(scores.repeat(DRAWS, 1), [sampling] * DRAWS)
    _check(tokens, _expected(scores, sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(min_p=0.1),
        Sampling(min_p=0.0001),
        Sampling(top_p=0.9, min_p=0.02),
        Sampling(temperature=1.3, top_k=30, min_p=0.2),
        Sampling(top_p=0.9, seed=1),
        Sampling(seed=1),
    ],
    ids=str,
)
def test_draws_with_a_least_probability_or_a_seed(sampling: Sampling) -> None:
    scores = _scores()
    origins = [None if sampling.seed is None else (sampling.seed, at) for at in range(DRAWS)]
    tokens = draw(scores.repeat(DRAWS, 1), [sampling] * DRAWS, Chance(origins))
    _check(tokens, _expected(scores, sampling))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_p=0.99), Sampling(top_p=0.5), Sampling(top_k=7)], ids=str
)
def test_a_seeded_draw_does_not_depend_on_its_batch(sampling: Sampling) -> None:
    scores = _scores().repeat(40, 1)
    others = [Sampling(top_p=0.8), Sampling(top_k=500), Sampling(), Sampling(min_p=0.3)] * 10
    mixed, origins = list(others), [None] * 40
    for at in (0, 17, 39):
        mixed[at] = sampling
        origins[at] = (7, 3)  # type: ignore[call-overload]
    together = draw(scores, mixed, Chance(origins))
    alone = draw(scores[:1], [sampling], Chance([(7, 3)]))
    assert {int(together[at]) for at in (0, 17, 39)} == {int(alone[0])}


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
