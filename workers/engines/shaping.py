"""What a request asks to be done to its scores before a token is drawn: penalties and biases.

As OpenAI defines `presence_penalty`, `frequency_penalty` (over the answer so far) and `logit_bias`,
and as `generate` defines `repetition_penalty` (over prompt and answer).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.admission import Sampling


def shape(
    scores: torch.Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> None:
    """Change the scores of one request, [token], in place."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.unique(torch.tensor([*prompt, *answer]))
        found = scores[seen]
        factor = sampling.repetition_penalty
        scores[seen] = torch.where(found < 0, found * factor, found / factor)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.unique(torch.tensor(answer), return_counts=True)
        penalty = sampling.presence_penalty + sampling.frequency_penalty * counts
        scores[tokens] -= penalty.to(scores.dtype)
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        scores[torch.tensor(tokens)] += torch.tensor(biases, dtype=scores.dtype)
