"""The compiled kernel as Python sees it.

`choose` gives the one for this processor, or None where plain torch has to do; a kernel whose
results differ from torch's on a small example is never used.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from config.logs import get_logger
from config.settings import Models
from workers.engines.kernels.building import KernelError, built, isa
from workers.engines.plans import Layout, Piece

log = get_logger(__name__)

Choice = Literal["auto", "torch", "compiled"]
_DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
        ("page_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("block_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("write_index", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tokens", ctypes.c_int32),
        ("count", ctypes.c_int32),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The attention of a model's layers, the same in all of them."""

    heads: int
    kv_heads: int
    size: int
    #: Of the scores.
    scale: float
    dtype: torch.dtype


class Kernel:
    """A loaded library. Threads are those torch has in the calling thread."""

    def __init__(self, library: Path, which: str) -> None:
        #: The instruction set it was built for.
        self.isa = which
        try:
            self._lib = ctypes.CDLL(str(library))
        except OSError as error:
            raise KernelError(f"{library.name} can't be loaded: {error}") from None
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._lib.fb_suits.argtypes = [pointer]
        self._lib.fb_layer.argtypes = [pointer] * 6
        self._lib.fb_layer.restype = None
        self._lib.fb_norm.argtypes = [pointer] * 3 + [whole, whole, ctypes.c_float]
        self._lib.fb_norm.argtypes += [ctypes.c_int32, ctypes.c_int32]
        self._lib.fb_norm.restype = None

    def suits(self, heads: Heads) -> bool:
        """Whether it computes layers like these."""
        if heads.dtype not in _DTYPES:
            return False
        shape = _shape(heads, Layout(page_tokens=1, block_stride=1, kv_heads=heads.kv_heads))
        return bool(self._lib.fb_suits(ctypes.byref(shape)))

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension of a contiguous tensor."""
        out = torch.empty_like(x)
        columns = x.size(-1)
        self._lib.fb_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // columns,
            columns,
            eps,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def step(
        self,
        pieces: Sequence[Piece],
        layout: Layout,
        heads: Heads,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        write_index: torch.Tensor,
    ) -> Step:
        """What all layers of a step share; `cos` and `sin` are [token, size]."""
        return Step(self._lib, pieces, layout, heads, cos, sin, write_index)


class Step:
    """One step of the loop. Holds what the library is given the addresses of."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        pieces: Sequence[Piece],
        layout: Layout,
        heads: Heads,
        cos: torch.Tensor,
        sin: torch.Tensor,
        write_index: torch.Tensor,
    ) -> None:
        self._layer = lib.fb_layer
        self._width = heads.heads * heads.size
        self._shape = _shape(heads, layout)
        #: Its pieces in the order in which they are worked on: the long ones can't come last.
        rows, tables = array("i"), array("i")
        for piece in sorted(pieces, key=lambda each: -each.queries * each.length):
            rows.extend((piece.start, piece.queries, piece.length, len(tables)))
            tables.extend(piece.blocks[: -(-piece.length // layout.page_tokens)])
        self._kept = (rows, tables, cos.contiguous(), sin.contiguous(), write_index.contiguous())
        self._step = _Step(
            cos=self._kept[2].data_ptr(),
            sin=self._kept[3].data_ptr(),
            write_index=self._kept[4].data_ptr(),
            pieces=rows.buffer_info()[0],
            tables=tables.buffer_info()[0],
            tokens=len(write_index),
            count=len(pieces),
        )
        self._shape_at = ctypes.addressof(self._shape)
        self._step_at = ctypes.addressof(self._step)

    def attend(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention of a layer, [token, head * size]; writes its keys and values to the cache.

        `qkv` is [token, feature], contiguous, and is changed; `keys` and `values` are the layer's
        views of the cache, [token, head, size].
        """
        out = qkv.new_empty(len(qkv), self._width)
        self._layer(
            self._shape_at,
            self._step_at,
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
        )
        return out


def _shape(heads: Heads, layout: Layout) -> _Shape:
    return _Shape(
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        size=heads.size,
        bf16=heads.dtype == torch.bfloat16,
        page_tokens=layout.page_tokens,
        threads=torch.get_num_threads(),
        block_stride=layout.block_stride,
        scale=heads.scale,
    )


def choose(choice: Choice, models: Models, heads: Heads) -> Kernel | None:
    """The kernel for these layers; None where torch serves them.

    Raises `KernelError` when `compiled` was asked for and can't be had.
    """
    if choice == "torch":
        return None
    try:
        return load(models, heads)
    except KernelError as error:
        if choice == "compiled":
            raise
        log.info("kernel_unavailable", reason=str(error))
        return None


def load(models: Models, heads: Heads, which: str = "") -> Kernel:
    """The kernel, built if need be and tried; for the best instruction set unless one is named."""
    which = which or isa()
    if not which:
        raise KernelError("the processor has no AVX-512")
    kernel = Kernel(built(models, which), which)
    if not kernel.suits(heads):
        raise KernelError("the model's attention has a shape it doesn't know")
    _try(kernel, heads)
    return kernel


def _try(kernel: Kernel, heads: Heads) -> None:
    """One prompt of 100 tokens against torch's attention."""
    count, page = 100, 32
    generator = torch.Generator().manual_seed(0)
    features = heads.heads + 2 * heads.kv_heads
    qkv = torch.randn(count, features, heads.size, generator=generator).to(heads.dtype)
    both = heads.heads + heads.kv_heads
    by_head = qkv.float().transpose(0, 1).unsqueeze(0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        by_head[:, : heads.heads],
        by_head[:, heads.heads : both],
        by_head[:, both:],
        is_causal=True,
        scale=heads.scale,
        enable_gqa=True,
    )[0].transpose(0, 1)
    blocks = list(range(math.ceil(count / page)))[::-1]
    rows = torch.tensor([blocks[at // page] * page + at % page for at in range(count)])
    keys = torch.zeros(len(blocks) * page, heads.kv_heads, heads.size, dtype=heads.dtype)
    values = torch.zeros_like(keys)
    one = torch.ones(count, heads.size, dtype=heads.dtype)
    step = kernel.step(
        [Piece(start=0, queries=count, length=count, blocks=blocks)],
        Layout(page_tokens=page, block_stride=page, kv_heads=heads.kv_heads),
        heads,
        # Position 0 everywhere: nothing is turned.
        cos=one,
        sin=torch.zeros_like(one),
        write_index=rows,
    )
    found = step.attend(qkv.flatten(1), keys, values).view(count, heads.heads, -1).float()
    near = 0.05 if heads.dtype == torch.bfloat16 else 1e-4
    if not torch.allclose(found, expected, atol=near, rtol=near):
        raise KernelError("its results are wrong on this machine")
