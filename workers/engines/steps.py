"""What a layer does between its products, for one step: positions, the cache, attention.

`TorchStep` works everywhere, `CompiledStep` where the kernel does. Both take the product of a layer
for queries, keys and values, and give what goes into the next one.
"""

from __future__ import annotations

from typing import Protocol

import torch

from workers.engines.attention import attend
from workers.engines.kernels.native import Heads, Kernel
from workers.engines.plans import Plan


class Step(Protocol):
    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """[token, feature] from `qkv` [token, queries keys values, size], which may be changed."""


class TorchStep:
    """By torch alone."""

    def __init__(
        self,
        plan: Plan,
        heads: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        write_index: torch.Tensor,
    ) -> None:
        self._plan = plan
        self._heads = heads
        # Half turned the other way: what is rolled there is negative.
        half = heads.size // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._cos, self._sin = cos.unsqueeze(1), sin.unsqueeze(1)
        self._write_index = write_index

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        heads, half = self._heads.heads, self._heads.size // 2
        both = heads + self._heads.kv_heads
        placed = qkv[:, :both]
        placed = torch.addcmul(placed * self._cos, placed.roll(half, dims=-1), self._sin)
        keys, values = placed[:, heads:], qkv[:, both:]
        cached_keys, cached_values = self._plan.views[layer]
        cached_keys.index_copy_(0, self._write_index, keys)
        cached_values.index_copy_(0, self._write_index, values)
        attended = attend(
            self._plan,
            layer,
            placed[:, :heads] * self._heads.scale,
            keys.transpose(0, 1),
            values.transpose(0, 1),
        )
        return attended.view(len(qkv), -1)


class CompiledStep:
    """By the kernel."""

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan,
        heads: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        write_index: torch.Tensor,
    ) -> None:
        self._views = plan.views
        self._step = kernel.step(
            plan.pieces, plan.layout, heads, cos=cos, sin=sin, write_index=write_index
        )

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        keys, values = self._views[layer]
        return self._step.attend(qkv.flatten(1), keys, values)
