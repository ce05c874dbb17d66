"""A loaded encoder: batches of token ids in, hidden states or logits out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workers.engines.bert import Bert, suits
from workers.engines.bucketing import Piece

Rows = np.ndarray[Any, Any]


class Network:
    """Thread-safe. On the CPU, where it suits, with the own forward pass."""

    def __init__(self, model: Any, device: torch.device, names: frozenset[str]) -> None:
        """`names` of what the checkpoint's tokeniser gives a model."""
        self.model = model
        self._device = device
        self._padding = getattr(model.config, "pad_token_id", None) or 0
        parameters = inspect.signature(model.forward).parameters
        self._types = "token_type_ids" in parameters and "token_type_ids" in names
        base = model.base_model
        own = suits(model) and type(base).__name__ == "BertModel"
        known = base is model or type(model).__name__ == "BertForSequenceClassification"
        self._own = Bert(base) if own and known else None

    def __call__(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states or logits, and the mask of the tokens."""
        lengths = [len(piece.tokens) for piece in pieces]
        longest = max(lengths)
        ids = np.full((len(pieces), longest), self._padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        types = np.zeros_like(ids)
        for row, piece in enumerate(pieces):
            ids[row, : lengths[row]] = piece.tokens
            mask[row, : lengths[row]] = 1
            if piece.second:
                types[row, piece.second : lengths[row]] = 1
        place = self._device
        seen = torch.from_numpy(mask).to(place)
        given: dict[str, torch.Tensor] = {"input_ids": torch.from_numpy(ids).to(place)}
        if self._types and types.any():
            given["token_type_ids"] = torch.from_numpy(types).to(place)
        padded = min(lengths) < longest
        if self._own is not None:
            hidden = self._own(
                given["input_ids"], seen if padded else None, given.get("token_type_ids")
            )
            return self._after(hidden), seen
        output = self.model(**given, attention_mask=seen)
        return output["logits" if "logits" in output else "last_hidden_state"], seen

    def _after(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a classifier makes of the hidden states."""
        if self.model.base_model is self.model:
            return hidden
        logits: torch.Tensor = self.model.classifier(self.model.base_model.pooler(hidden))
        return logits


def last_in_float32(model: Any) -> None:
    """The last layer keeps its precision: it costs nothing, and scores stay apart."""
    last = getattr(model, "classifier", None) or getattr(model, "score", None)
    if last is None or model.dtype is torch.float32:
        return
    last.float()
    last.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
