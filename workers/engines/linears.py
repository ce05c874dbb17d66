"""Linear layers whose weights oneDNN has laid out for this processor, with what follows fused in.

On the CPU `torch.nn.functional.linear` lays a weight out anew at every call. Laid out once it is
used faster, and activation, product or sum need no pass of their own. Costs a second copy of the
weights. Where oneDNN can't have a weight, the same is done by plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Rows the layout is chosen for; any number works.
_ROWS = 64


class Linear:
    """`x @ weight.T + bias` of one layer, or of several with the same input, one after another."""

    def __init__(self, *layers: nn.Linear) -> None:
        first = layers[0].weight
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else first
        self._bias = _joined_bias(layers)
        self._weight = weight.detach()
        self._packed = _packable(weight)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "none") if self._packed else self._plain(x)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Followed by SiLU."""
        return self._unary(x, "swish") if self._packed else functional.silu(self._plain(x))

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Multiplied by `other`, element by element."""
        return self._binary(x, other, "mul") if self._packed else self._plain(x) * other

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Added to `other`."""
        return self._binary(x, other, "add") if self._packed else self._plain(x) + other

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def _unary(self, x: torch.Tensor, then: str) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, then, [], ""
        )
        return result

    def _binary(self, x: torch.Tensor, other: torch.Tensor, then: str) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, then
        )
        return result


def _joined_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
    ).detach()


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    ops: Any = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
