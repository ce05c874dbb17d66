"""Own forward pass of Llama-like models for a step of the batching loop on the CPU.

The same arithmetic as the layers of transformers on the same weights, without their bookkeeping:
requests lie one after another in [token, feature], the linear layers are those of
`workers.engines.linears`, and what comes between them is a `workers.engines.steps.Step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from workers.engines.kernels.native import Heads, Kernel
from workers.engines.linears import Linear
from workers.engines.plans import Plan
from workers.engines.steps import CompiledStep, Step, TorchStep

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


def heads_of(model: Any) -> Heads:
    """The attention of a model that `suits`."""
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    return Heads(
        heads=attention.q_proj.out_features // size,
        kv_heads=attention.k_proj.out_features // size,
        size=size,
        scale=attention.scaling,
        dtype=model.dtype,
    )


class Decoder:
    """In the place of the model in the loop; called once a step.

    With a kernel it computes what lies between the products.
    """

    def __init__(self, model: Any, kernel: Kernel | None = None) -> None:
        self._kernel = kernel
        self._heads = heads_of(model)
        self._embed = model.model.embed_tokens.weight.detach()
        self._rotary = model.model.rotary_emb
        self._layers = [
            _Layer(layer, index, self._heads, kernel)
            for index, layer in enumerate(model.model.layers)
        ]
        self._norm = _Norm(model.model.norm, kernel)
        self._head = Linear(model.lm_head)
        #: The model's own copy of the weights is gone.
        self.alone = False

    @property
    def kernel(self) -> str:
        """`torch`, or the instruction set the compiled kernel was built for."""
        return "torch" if self._kernel is None else self._kernel.isa

    def release(self, model: Any) -> None:
        """Let go of the weights that were laid out anew; the model can't compute any more."""
        self.alone = True
        for layer in model.model.layers:
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    empty = part.weight.new_empty(0)
                    part.weight = nn.Parameter(empty, requires_grad=False)

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
        cos, sin = (each[0] for each in self._rotary(hidden, position_ids))
        step: Step
        if self._kernel is None:
            step = TorchStep(plan, self._heads, cos, sin, write_index[0])
        else:
            step = CompiledStep(self._kernel, plan, self._heads, cos, sin, write_index[0])
        for layer in self._layers:
            hidden = layer(hidden, step)
        kept = hidden.index_select(0, logits_to_keep)
        return Output(self._head(self._norm(kept)).unsqueeze(0))


class _Norm:
    def __init__(self, norm: Any, kernel: Kernel | None) -> None:
        self._kernel = kernel
        self._weight = norm.weight.detach()
        self._eps = norm.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None and x.is_contiguous():
            return self._kernel.norm(x, self._weight, self._eps)
        return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Layer:
    def __init__(self, layer: Any, index: int, heads: Heads, kernel: Kernel | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._heads = heads
        self._qkv = Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Linear(attention.o_proj)
        self._gate, self._up = Linear(mlp.gate_proj), Linear(mlp.up_proj)
        self._down = Linear(mlp.down_proj)
        self._before = _Norm(layer.input_layernorm, kernel)
        self._after = _Norm(layer.post_attention_layernorm, kernel)
        # Qwen3 only.
        self._query_norm = _Norm(attention.q_norm, None) if hasattr(attention, "q_norm") else None
        self._key_norm = _Norm(attention.k_norm, None) if hasattr(attention, "k_norm") else None

    def __call__(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        qkv = self._qkv(self._before(hidden)).view(len(hidden), -1, self._heads.size)
        attended = step.attend(self._index, self._normed(qkv))
        hidden = self._out.plus(attended, hidden)
        x = self._after(hidden)
        return self._down.plus(self._up.times(x, self._gate.silu(x)), hidden)

    def _normed(self, qkv: torch.Tensor) -> torch.Tensor:
        if self._query_norm is None or self._key_norm is None:
            return qkv
        heads = self._heads.heads
        both = heads + self._heads.kv_heads
        query, key = self._query_norm(qkv[:, :heads]), self._key_norm(qkv[:, heads:both])
        return torch.cat((query, key, qkv[:, both:]), dim=1)
