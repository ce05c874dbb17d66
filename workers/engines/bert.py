"""Own forward pass of BERT on the CPU: the same arithmetic without the bookkeeping of its layers.

The linear layers are those of `workers.engines.linears`: laid out for the processor once, with
queries, keys and values in one and with what follows fused in. Keeps no state: several threads
may compute at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from workers.engines.linears import Linear

#: Tokens up to which products of all heads at once are quicker than the tiles of a flash kernel.
_SHORT = 32


def suits(model: Any) -> bool:
    """Whether `Bert` computes what this model's encoder does."""
    config = model.config
    return (
        model.device.type == "cpu"
        and config.model_type == "bert"
        and config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
        and model.dtype in (torch.float32, torch.bfloat16)
    )


class Bert:
    """In the place of a `BertModel`; gives the hidden states of the last layer."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.embeddings
        self._layers = [_Layer(layer) for layer in model.encoder.layer]

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None
    ) -> torch.Tensor:
        """[text, token] in, [text, token, feature] out; `mask` is 0 for padding, None without."""
        texts, tokens = ids.shape
        hidden = self._embeddings(input_ids=ids, token_type_ids=types).flatten(0, 1)
        seen = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self._layers:
            hidden = layer(hidden, seen, texts, tokens)
        last: torch.Tensor = hidden.view(texts, tokens, -1)
        return last


class _Widening(Linear):
    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Followed by GELU."""
        if not self._packed:
            return functional.gelu(self._plain(x))
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "gelu", [], "none"
        )
        return result


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention = layer.attention.self
        self._shape = (3, attention.num_attention_heads, attention.attention_head_size)
        self._qkv = Linear(attention.query, attention.key, attention.value)
        self._out = Linear(layer.attention.output.dense)
        self._up = _Widening(layer.intermediate.dense)
        self._down = Linear(layer.output.dense)
        self._after_attention = layer.attention.output.LayerNorm
        self._after_all = layer.output.LayerNorm

    def __call__(
        self, hidden: torch.Tensor, seen: torch.Tensor | None, texts: int, tokens: int
    ) -> torch.Tensor:
        qkv = self._qkv(hidden).view(texts, tokens, *self._shape).permute(2, 0, 3, 1, 4)
        attended = _short(qkv) if seen is None and tokens <= _SHORT else _any(qkv, seen)
        attended = attended.transpose(1, 2).reshape(texts * tokens, -1)
        hidden = self._after_attention(self._out.plus(attended, hidden))
        result: torch.Tensor = self._after_all(self._down.plus(self._up.gelu(hidden), hidden))
        return result


def _any(qkv: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Attention of [query or key or value, text, head, token, feature]."""
    query, key, value = qkv
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def _short(qkv: torch.Tensor) -> torch.Tensor:
    """The same for short texts without padding; in float32, which is quicker at this size."""
    _, texts, heads, tokens, size = qkv.shape
    query, key, value = qkv.float().reshape(3, texts * heads, tokens, size)
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(size**-0.5)
    attended = torch.bmm(torch.softmax(scores, dim=-1), value).to(qkv.dtype)
    return attended.view(texts, heads, tokens, size)
