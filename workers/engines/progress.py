"""What grows with an answer beside its tokens: its place in a grammar, and its logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from broker.pieces import TokenLogprob
from workers.engines.vocabulary import Guide, Vocabulary


@dataclass(frozen=True, slots=True)
class Scored:
    """A token that was taken, by the model's own distribution."""

    token: int
    logprob: float
    #: The likeliest tokens at its place, the likeliest first.
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True)
class Progress:
    """Of one answer. The loop writes it, and whoever gets a token may read what belongs to it."""

    guide: Guide | None = None
    #: How many of the likeliest tokens are noted; None when nothing is.
    top: int | None = None
    #: One for each token, in order.
    scored: list[Scored] = field(default_factory=list)

    def __deepcopy__(self, _: Any) -> Progress:
        # A request that is put aside is copied; what it has come to isn't.
        return self


def note(raw: torch.Tensor, tokens: Sequence[int], progress: Sequence[Progress]) -> None:
    """Note tokens, by scores as the model gave them, [row, token]."""
    logprobs = raw.log_softmax(dim=-1)
    most = max(each.top or 0 for each in progress)
    best, order = logprobs.topk(min(most, raw.size(-1)), dim=-1)
    for row, (each, token) in enumerate(zip(progress, tokens, strict=True)):
        top = zip(order[row, : each.top].tolist(), best[row, : each.top].tolist(), strict=True)
        each.scored.append(Scored(token, float(logprobs[row, token]), tuple(top)))


def shown(scored: Scored, vocabulary: Vocabulary) -> TokenLogprob:
    """As the chat endpoint shows it."""
    return {
        **_token(scored.token, scored.logprob, vocabulary),
        "top_logprobs": [_token(token, logprob, vocabulary) for token, logprob in scored.top],
    }


#: JSON has no infinity; a token that can't come gets what OpenAI says in its place.
_NEVER = -9999.0


def _token(token: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    raw = vocabulary.bytes_of(token)
    return {
        "token": raw.decode(errors="replace"),
        "logprob": max(logprob, _NEVER),
        "bytes": list(raw),
    }
