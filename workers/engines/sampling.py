"""Draws the next tokens of a batch, each request by its own temperature, top_k and top_p.

transformers' per-request processors sort the whole vocabulary for every request of a step, greedy
ones included. Here greedy requests cost no more than their argmax: the loop takes the argmax of
every row, and for a request that samples the token drawn here is made the largest of its row.

The filters are those of `generate`: temperature, then the `top_k` largest, then among those the
tokens with less than `top_p` of the mass above them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from workers.admission import Sampling

#: Vocabulary is summed up in blocks of this many tokens, so that a draw reads few of them.
_BLOCK = 256
#: Draws that fell outside the nucleus are repeated this often before the row is sorted.
_REDRAWS = 6


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The whole list of logits processors of a batching loop."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList([]))
        self.do_processing = True
        #: Rows of temperature, top_k and top_p, read on the device.
        self.tensors_required = 3
        self.supported_keys = {"sampling": Sampling}
        #: Rows of the step at hand that sample, and how.
        self._sampled: list[tuple[int, Sampling]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        rows: list[Sampling | None] = [
            request.state.logit_processor_kwargs.get("sampling")
            for request in requests_in_batch
            if request.has_new_token
        ]
        self._sampled = [
            (row, sampling)
            for row, sampling in enumerate(rows)
            if sampling is not None and not sampling.greedy
        ]
        if arg_storage.device.type != "cpu" and rows:
            packed = torch.zeros((3, len(rows)), dtype=torch.int32)
            for row, sampling in self._sampled:
                packed.view(torch.float32)[0, row] = sampling.temperature
                packed[1, row] = sampling.top_k
                packed.view(torch.float32)[2, row] = sampling.top_p
            arg_storage[:3, : len(rows)] = packed.to(arg_storage.device)
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        if scores.device.type != "cpu":
            temperature, _, top_p = logits_processor_args.view(torch.float32)[:, : len(scores)]
            top_k = logits_processor_args[1, : len(scores)]
            return raise_drawn(scores, temperature, top_k, top_p)
        if self._sampled:
            rows = torch.tensor([row for row, _ in self._sampled])
            tokens = draw(scores[rows], [sampling for _, sampling in self._sampled])
            scores[rows, tokens] = torch.inf
        return scores


def raise_drawn(
    scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Scores in which the drawn token of each row is the largest; temperature 0 leaves a row alone.

    Uses tensor operations only and no host value, so it can be part of a CUDA graph.
    """
    greedy = (temperature == 0).unsqueeze(-1)
    scaled = scores / temperature.unsqueeze(-1).masked_fill(greedy, 1.0)
    ordered, order = scaled.sort(dim=-1, descending=True)
    rank = torch.arange(scores.size(-1), device=scores.device)
    limit = top_k.unsqueeze(-1)
    ordered = ordered.masked_fill((limit > 0) & (rank >= limit), -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    above = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill((above >= top_p.unsqueeze(-1)) & (rank > 0), -torch.inf)
    # Gumbel-max: the argmax of scores plus this noise is a draw from their softmax.
    noise = -torch.empty_like(ordered).exponential_().log()
    drawn = order.gather(-1, (ordered + noise).argmax(dim=-1, keepdim=True))
    return torch.where(greedy, scores, scores.scatter(-1, drawn, torch.inf))


def draw(scores: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """One token for each row; for the CPU, where sorting a vocabulary costs more than a step."""
    temperature = torch.tensor([each.temperature for each in sampling]).unsqueeze(-1)
    scaled = scores / temperature
    tokens = torch.empty(len(sampling), dtype=torch.int64)
    limited = [row for row, each in enumerate(sampling) if each.top_k]
    free = [row for row, each in enumerate(sampling) if not each.top_k]
    if limited:
        tokens[limited] = _draw_limited(scaled[limited], [sampling[row] for row in limited])
    if free:
        top_p = torch.tensor([sampling[row].top_p for row in free])
        tokens[free] = _draw_free(scaled[free].softmax(dim=-1), top_p)
    return tokens


def _draw_limited(scaled: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """Rows with a top_k: only the largest tokens are looked at."""
    limits = torch.tensor([min(each.top_k, scaled.size(-1)) for each in sampling]).unsqueeze(-1)
    best, order = scaled.topk(int(limits.max()), dim=-1)
    best = best.masked_fill(torch.arange(best.size(-1)) >= limits, -torch.inf)
    probabilities = best.softmax(dim=-1)
    top_p = torch.tensor([each.top_p for each in sampling])
    return order.gather(-1, _draw_sorted(probabilities, top_p).unsqueeze(-1)).squeeze(-1)


def _draw_sorted(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Index drawn from rows sorted downwards, within their nucleus."""
    above = probabilities.cumsum(dim=-1) - probabilities
    outside = above >= top_p.unsqueeze(-1)
    outside[:, 0] = False
    return _invert(probabilities.masked_fill(outside, 0.0))


def _draw_free(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Rows without a top_k: draw from all, and again while the draw lies outside the nucleus.

    That is a draw from the nucleus, at the price of a pass over the row instead of sorting it.
    """
    tokens = _invert(probabilities)
    rows = (top_p < 1).nonzero().squeeze(-1)
    for _ in range(_REDRAWS):
        rows = rows[~_inside(probabilities[rows], tokens[rows], top_p[rows])]
        if not len(rows):
            return tokens
        tokens[rows] = _invert(probabilities[rows])
    rows = rows[~_inside(probabilities[rows], tokens[rows], top_p[rows])]
    if len(rows):
        ordered, order = probabilities[rows].sort(dim=-1, descending=True)
        drawn = _draw_sorted(ordered, top_p[rows])
        tokens[rows] = order.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return tokens


def _inside(probabilities: torch.Tensor, tokens: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    own = probabilities.gather(-1, tokens.unsqueeze(-1))
    above = torch.where(probabilities > own, probabilities, 0.0).sum(dim=-1)
    return above < top_p


def _invert(weights: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at a random point, first by block, then inside it."""
    rows, size = weights.shape
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - size % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    point = torch.rand(rows, 1, dtype=torch.float64) * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp(max=ends.size(-1) - 1)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks[torch.arange(rows), block.squeeze(-1)]
    inner_ends = inner.cumsum(dim=-1, dtype=torch.float64)
    within = torch.searchsorted(inner_ends, point - start, right=True).clamp(max=_BLOCK - 1)
    # Rounding can end on a token without weight; its heaviest neighbour stands in.
    empty = inner.gather(-1, within) == 0
    within = torch.where(empty, inner.argmax(dim=-1, keepdim=True), within)
    return (block * _BLOCK + within).squeeze(-1)
