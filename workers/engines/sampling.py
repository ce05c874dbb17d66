"""Draws the next tokens of a batch, each request by its own temperature, top_k and top_p.

transformers' per-request processors sort the whole vocabulary for every request of a step, greedy
ones included. Here greedy requests cost no more than their argmax: the loop takes the argmax of
every row, and for a request that samples the token drawn here is made the largest of its row.

The filters are those of `generate`: temperature, then the `top_k` largest, then among those the
tokens with less than `top_p` of the mass above them, then those with at least `min_p` of the
largest's probability. On the CPU most draws look at a few candidates only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from config.logs import get_logger
from workers.admission import Sampling
from workers.engines.chance import Chance
from workers.engines.progress import Progress, note
from workers.engines.shaping import shape
from workers.engines.vocabulary import GuideError

log = get_logger(__name__)

#: Likeliest tokens among which a nucleus is looked for first.
_CANDIDATES = 64
#: Vocabulary is summed up in blocks of this many tokens, so that a draw reads few of them.
_BLOCK = 256
#: Draws that fell outside the nucleus are repeated this often before the row is sorted.
_REDRAWS = 6


GREEDY = Sampling(temperature=0.0)
_PLAIN = Progress()


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The whole list of logits processors of a batching loop."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList([]))
        self.do_processing = True
        #: Rows of temperature, top_k and top_p, read on the device.
        self.tensors_required = 3
        self.supported_keys = {"sampling": Sampling, "progress": Progress}
        #: Rows of the step at hand with their requests, and those of them that sample.
        self._rows: list[tuple[Any, Sampling]] = []
        self._sampled: list[tuple[int, Sampling]] = []
        #: Requests of the step whose scores are no numbers or could not be shaped.
        self.spoilt: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        self._rows = [
            (request.state, request.state.logit_processor_kwargs.get("sampling") or GREEDY)
            for request in requests_in_batch
            if request.has_new_token
        ]
        rows = self._rows
        self._sampled = [
            (row, sampling) for row, (_, sampling) in enumerate(rows) if not sampling.greedy
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
        noted = [
            (row, progress)
            for row, (state, _) in enumerate(self._rows)
            if (progress := _progress(state)).top is not None
        ]
        raw = scores[[row for row, _ in noted]] if noted else None
        self._shape(scores)
        self._draw(scores)
        if raw is not None:
            tokens = scores[[row for row, _ in noted]].argmax(dim=-1).tolist()
            note(raw, tokens, [progress for _, progress in noted])
        return scores

    def _draw(self, scores: torch.Tensor) -> None:
        """Make the token that is drawn for a row its largest."""
        if self._sampled:
            rows = torch.tensor([row for row, _ in self._sampled])
            chance = Chance(
                [
                    None if how.seed is None else (how.seed, len(_answer(self._rows[row][0])))
                    for row, how in self._sampled
                ]
            )
            tokens = draw(scores[rows], [how for _, how in self._sampled], chance)
            scores[rows, tokens] = torch.inf

    def _shape(self, scores: torch.Tensor) -> None:
        """Penalties, biases and grammars; a row that can't be used is made harmless and noted."""
        self.spoilt = []
        # One number that is none, or infinite, makes the sum so.
        total = scores.sum(dim=-1)
        bad = set((total.isnan() | (total == torch.inf)).nonzero().flatten().tolist())
        for row, (state, sampling) in enumerate(self._rows):
            guide = _progress(state).guide
            if row not in bad and (sampling.shapes or guide is not None):
                answer = _answer(state)
                prompt = state.initial_tokens[: state._true_initial_tokens or None]
                try:
                    shape(scores[row], sampling, prompt, answer)
                    if guide is not None:
                        guide.hold(scores[row], answer)
                except GuideError:
                    bad.add(row)
                except Exception as error:
                    log.error("scores_not_shaped", error=type(error).__name__)
                    bad.add(row)
        for row in bad:
            scores[row] = 0.0
            self.spoilt.append(self._rows[row][0])


def _progress(state: Any) -> Progress:
    progress: Progress = state.logit_processor_kwargs.get("progress", _PLAIN)
    return progress


def _answer(state: Any) -> list[int]:
    """Tokens generated so far, those before a request was put aside included."""
    before = state._true_initial_tokens
    earlier = state.initial_tokens[before:] if before else []
    return [*earlier, *state.generated_tokens]


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


def draw(
    scores: torch.Tensor, sampling: Sequence[Sampling], chance: Chance | None = None
) -> torch.Tensor:
    """One token for each row; for the CPU, where sorting a vocabulary costs more than a step."""
    chance = chance or Chance([None] * len(sampling))
    scaled = scores / torch.tensor([each.temperature for each in sampling]).unsqueeze(-1)
    tokens = torch.empty(len(sampling), dtype=torch.int64)
    limited = [row for row, each in enumerate(sampling) if each.top_k]
    cut = [row for row, each in enumerate(sampling) if not each.top_k and each.cuts]
    free = [row for row, each in enumerate(sampling) if not each.top_k and not each.cuts]
    if limited:
        tokens[limited] = _draw_limited(scaled, limited, sampling, chance)
    if cut:
        drawn, open_rows = _draw_candidates(scaled, cut, sampling, chance)
        tokens[cut] = drawn
        free += open_rows
    if free:
        tokens[free] = _draw_free(scaled, free, sampling, chance)
    return tokens


class _Cuts:
    """`top_p` and `min_p` of some rows."""

    def __init__(self, rows: Sequence[int], sampling: Sequence[Sampling]) -> None:
        self.top_p = torch.tensor([sampling[row].top_p for row in rows]).unsqueeze(-1)
        self.min_p = torch.tensor([sampling[row].min_p for row in rows]).unsqueeze(-1)

    def outside(self, ordered: torch.Tensor) -> torch.Tensor:
        """Which of the probabilities, sorted downwards, are cut off; never the first."""
        above = ordered.cumsum(dim=-1) - ordered
        outside = (above >= self.top_p) | (ordered < self.min_p * ordered[:, :1])
        outside[:, 0] = False
        return outside


def _draw_limited(
    scaled: torch.Tensor, rows: list[int], sampling: Sequence[Sampling], chance: Chance
) -> torch.Tensor:
    """Rows with a top_k: only the largest tokens are looked at."""
    limits = torch.tensor([min(sampling[row].top_k, scaled.size(-1)) for row in rows]).unsqueeze(-1)
    best, order = scaled[rows].topk(int(limits.max()), dim=-1)
    best = best.masked_fill(torch.arange(best.size(-1)) >= limits, -torch.inf)
    probabilities = best.softmax(dim=-1)
    inside = probabilities.masked_fill(_Cuts(rows, sampling).outside(probabilities), 0.0)
    return order.gather(-1, _invert(inside, chance.points(rows)).unsqueeze(-1)).squeeze(-1)


def _draw_candidates(
    scaled: torch.Tensor, rows: list[int], sampling: Sequence[Sampling], chance: Chance
) -> tuple[torch.Tensor, list[int]]:
    """Rows with a nucleus, drawn from their likeliest tokens if these hold all of it.

    Returns tokens, and the rows whose nucleus is larger, whose tokens mean nothing.
    """
    mine = scaled if len(rows) == len(scaled) else scaled[rows]
    best, order = mine.topk(min(_CANDIDATES, mine.size(-1)), dim=-1)
    probabilities = (best - mine.logsumexp(dim=-1, keepdim=True)).exp()
    cuts = _Cuts(rows, sampling)
    outside = cuts.outside(probabilities)
    if best.size(-1) == mine.size(-1):
        complete = torch.ones(len(rows), dtype=torch.bool)
    else:
        # What comes after the last candidate is cut off if it is, or once the mass is reached.
        full = probabilities.sum(dim=-1, keepdim=True) >= cuts.top_p
        complete = outside[:, -1] | full.squeeze(-1)
    inside = probabilities.masked_fill(outside, 0.0)
    tokens = order.gather(-1, _invert(inside, chance.points(rows)).unsqueeze(-1)).squeeze(-1)
    return tokens, [row for row, done in zip(rows, complete.tolist(), strict=True) if not done]


def _draw_free(
    scaled: torch.Tensor, rows: list[int], sampling: Sequence[Sampling], chance: Chance
) -> torch.Tensor:
    """Draw from all tokens, and again while the draw lies outside the nucleus.

    That is a draw from the nucleus, at the price of a pass over the row instead of sorting it.
    """
    probabilities = scaled[rows].softmax(dim=-1)
    tokens = _invert(probabilities, chance.points(rows))
    cuts = _Cuts(rows, sampling)
    left = [at for at, row in enumerate(rows) if sampling[row].cuts]
    for turn in range(_REDRAWS + 1):
        inside = _inside(probabilities[left], tokens[left], cuts.top_p[left], cuts.min_p[left])
        left = [at for at, done in zip(left, inside.tolist(), strict=True) if not done]
        if not left or turn == _REDRAWS:
            break
        tokens[left] = _invert(probabilities[left], chance.points([rows[at] for at in left]))
    if left:
        ordered, order = probabilities[left].sort(dim=-1, descending=True)
        which = [rows[at] for at in left]
        weights = ordered.masked_fill(_Cuts(which, sampling).outside(ordered), 0.0)
        drawn = _invert(weights, chance.points(which))
        tokens[left] = order.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return tokens


def _inside(
    probabilities: torch.Tensor, tokens: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    own = probabilities.gather(-1, tokens.unsqueeze(-1))
    above = torch.where(probabilities > own, probabilities, 0.0).sum(dim=-1, keepdim=True)
    most = probabilities.amax(dim=-1, keepdim=True)
    return ((above < top_p) & (own >= min_p * most)).squeeze(-1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at the points, first by block, then inside it."""
    rows, size = weights.shape
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - size % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    point = points * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp(max=ends.size(-1) - 1)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks[torch.arange(rows), block.squeeze(-1)]
    inner_ends = inner.cumsum(dim=-1, dtype=torch.float64)
    within = torch.searchsorted(inner_ends, point - start, right=True).clamp(max=_BLOCK - 1)
    # Rounding can end on a token without weight; its heaviest neighbour stands in.
    empty = inner.gather(-1, within) == 0
    within = torch.where(empty, inner.argmax(dim=-1, keepdim=True), within)
    return (block * _BLOCK + within).squeeze(-1)
