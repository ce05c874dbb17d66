"""Own forward pass of Llama-like models for a step of the batching loop on the CPU.

The same arithmetic as the layers of transformers on the same weights, without their bookkeeping:
requests lie one after another in [token, feature], the linear layers are those of
`workers.engines.linears`, keys go straight into the cache and attention is `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from workers.engines.attention import attend
from workers.engines.linears import Linear
from workers.engines.plans import Plan

#: Models that are what `_Layer` computes, with biases and norms of queries and keys where they are.
_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_SILU = frozenset({"silu", "swish"})


def suits(model: Any) -> bool:
    """Whether `Decoder` computes what this model does."""
    config = model.config
    return (
        model.device.type == "cpu"
        and config.model_type in _KNOWN
        and config.hidden_act in _SILU
        and model.dtype in (torch.float32, torch.bfloat16)
    )


@dataclass(frozen=True, slots=True)
class Output:
    """As much of transformers' output as the loop reads."""

    #: [1, kept position, token].
    logits: torch.Tensor


class Decoder:
    """In the place of the model in the loop; called once a step."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._embed = model.model.embed_tokens.weight.detach()
        self._rotary = model.model.rotary_emb
        self._layers = [_Layer(layer, index) for index, layer in enumerate(model.model.layers)]
        self._norm = _Norm(model.model.norm)
        self._head = Linear(model.lm_head)
        self._half = _head_size(config) // 2

    def _supports_logits_to_keep(self) -> bool:
        """Asked by transformers: logits are computed for the positions it names only."""
        return True

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: Sequence[torch.Tensor],
        logits_to_keep: torch.Tensor,
        plan: Plan,
        **_: Any,
    ) -> Output:
        hidden = functional.embedding(input_ids[0], self._embed)
        cos, sin = self._rotary(hidden, position_ids)
        # Half turned the other way: what is rolled there is negative.
        sin = torch.cat((-sin[..., : self._half], sin[..., self._half :]), dim=-1)
        rotation = (cos[0].unsqueeze(1), sin[0].unsqueeze(1))
        for layer in self._layers:
            hidden = layer(hidden, rotation, plan, write_index[0])
        kept = hidden.index_select(0, logits_to_keep)
        return Output(self._head(self._norm(kept)).unsqueeze(0))


class _Norm:
    def __init__(self, norm: Any) -> None:
        self._weight = norm.weight.detach()
        self._eps = norm.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Layer:
    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._size = attention.head_dim
        self._heads = attention.q_proj.out_features // self._size
        self._kv_heads = attention.k_proj.out_features // self._size
        self._scaling = attention.scaling
        self._qkv = Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Linear(attention.o_proj)
        self._gate, self._up = Linear(mlp.gate_proj), Linear(mlp.up_proj)
        self._down = Linear(mlp.down_proj)
        self._before = _Norm(layer.input_layernorm)
        self._after = _Norm(layer.post_attention_layernorm)
        # Qwen3 only.
        self._query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None

    def __call__(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        plan: Plan,
        write_index: torch.Tensor,
    ) -> torch.Tensor:
        count = hidden.size(0)
        heads, kv_heads = self._heads, self._kv_heads
        qkv = self._qkv(self._before(hidden)).view(count, heads + 2 * kv_heads, self._size)
        turned = self._turned(qkv[:, : heads + kv_heads], rotation)
        keys, values = turned[:, heads:], qkv[:, heads + kv_heads :]
        cached_keys, cached_values = plan.views[self._index]
        cached_keys.index_copy_(0, write_index, keys)
        cached_values.index_copy_(0, write_index, values)
        attended = attend(
            plan,
            self._index,
            turned[:, :heads] * self._scaling,
            keys.transpose(0, 1),
            values.transpose(0, 1),
        )
        hidden = self._out.plus(attended.view(count, -1), hidden)
        x = self._after(hidden)
        return self._down.plus(self._up.times(x, self._gate.silu(x)), hidden)

    def _turned(
        self, heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Queries and keys with their positions in them."""
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = heads[:, : self._heads], heads[:, self._heads :]
            heads = torch.cat((self._query_norm(queries), self._key_norm(keys)), dim=1)
        cos, sin = rotation
        return torch.addcmul(heads * cos, heads.roll(self._size // 2, dims=-1), sin)


def _head_size(config: Any) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
