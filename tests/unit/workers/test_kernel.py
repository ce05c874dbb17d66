"""The compiled kernel against plain torch, over random shapes, for each instruction set here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from config.settings import Models
from workers.engines.kernels import building, native
from workers.engines.kernels.building import ISAS, KernelError
from workers.engines.kernels.native import Heads, Kernel
from workers.engines.plans import Layout, Piece, Plan
from workers.engines.steps import CompiledStep, TorchStep

# Threads that wait for each other would spin; see workers.pinning.
torch.set_num_threads(1)

HEADS = Heads(heads=6, kv_heads=2, size=32, scale=32**-0.5, dtype=torch.float32)
#: How far results may be from torch's: sums come in another order, and bfloat16 rounds elsewhere.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def _kernel(which: str, heads: Heads) -> Kernel:
    if not building.compiler():
        # Also where tests are run for everybody: nothing may depend on it.
        pytest.skip("there is no C++ compiler")
    best = building.isa()
    names = list(ISAS)
    if not best or names.index(which) < names.index(best):
        pytest.skip(f"the processor has no {which}")
    return native.load(Models(), heads, which)


def _steps(
    kernel: Kernel, heads: Heads, requests: list[tuple[int, int]], page: int
) -> tuple[Any, Any, torch.Tensor, Any, Any]:
    """Both kinds of step over the same cache in two copies, and a random product for them."""
    pages = 1 + sum(-(-length // page) for _, length in requests)
    free = torch.randperm(pages - 1).add(1).tolist()
    stride = 2 * page
    pieces, places, start = [], [], 0
    for queries, length in requests:
        blocks = [free.pop() for _ in range(-(-length // page))]
        pieces.append(Piece(start=start, queries=queries, length=length, blocks=blocks))
        start += queries
        places += [
            blocks[at // page] * stride + at % page for at in range(length - queries, length)
        ]
    flat = torch.randn(pages * stride, heads.kv_heads, heads.size).to(heads.dtype)
    layout = Layout(page_tokens=page, block_stride=stride, kv_heads=heads.kv_heads)
    angle = torch.rand(start, heads.size // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    index = torch.tensor(places)
    caches = [flat.clone() for _ in range(2)]
    plans = [Plan(pieces, layout, {0: (cache, cache[page:])}) for cache in caches]
    qkv = torch.randn(start, heads.heads + 2 * heads.kv_heads, heads.size).to(heads.dtype)
    torch_step = TorchStep(plans[0], heads, cos, sin, index)
    return torch_step, CompiledStep(kernel, plans[1], heads, cos, sin, index), qkv, *caches


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_steps_are_as_torch_computes_them(which: str, dtype: torch.dtype) -> None:
    chance = random.Random(7)
    torch.manual_seed(7)
    for _ in range(25):
        kv_heads = chance.choice([1, 2, 3])
        size = chance.choice([16, 32, 64, 80, 128])
        heads = Heads(
            heads=kv_heads * chance.choice([1, 2, 3, 5, 7]),
            kv_heads=kv_heads,
            size=size,
            scale=size**-0.5,
            dtype=dtype,
        )
        page = chance.choice([4, 32])
        requests = []
        for _ in range(chance.randint(1, 6)):
            queries = chance.choice([1, 1, 1, 2, 31, 33, 97, 140])
            # At the borders of pages and of the kernel's blocks as well as between them.
            before = chance.choice([0, 0, 1, 15, 16, 31, 32, 63, 64, 65, 200])
            requests.append((queries, queries + before))
        expected, found, qkv, its, own = _steps(_kernel(which, heads), heads, requests, page)
        near = {"atol": NEAR[dtype], "rtol": NEAR[dtype]}
        torch.testing.assert_close(found.attend(0, qkv.clone()), expected.attend(0, qkv), **near)
        torch.testing.assert_close(own, its, **near)


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("length", [1, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 4000])
def test_every_length_counts_all_of_its_keys(which: str, length: int) -> None:
    expected, found, qkv, _, _ = _steps(_kernel(which, HEADS), HEADS, [(1, length)], 32)
    torch.testing.assert_close(
        found.attend(0, qkv.clone()), expected.attend(0, qkv), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("columns", [16, 96, 576, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms(which: str, columns: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(11, columns).to(dtype), torch.rand(columns).to(dtype)
    found = _kernel(which, HEADS).norm(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x.float(), (columns,), weight.float(), 1e-5)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=0.01)


@pytest.mark.parametrize("which", ISAS)
def test_what_is_no_number_stays_none(which: str) -> None:
    _, found, qkv, _, _ = _steps(_kernel(which, HEADS), HEADS, [(1, 40), (1, 40)], 32)
    qkv[0] = torch.nan
    out = found.attend(0, qkv)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


# -- where it can't be had -------------------------------------------------------------------------
def test_without_a_compiler_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(building, "compiler", lambda: "")
    models = Models(cache_dir=str(tmp_path))
    assert native.choose("auto", models, HEADS) is None
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        native.choose("compiled", models, HEADS)


def test_without_the_instructions_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "isa", lambda: "")
    assert native.choose("auto", Models(cache_dir=str(tmp_path)), HEADS) is None
    assert list(tmp_path.iterdir()) == []


def test_anothers_private_folder_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(Path, "exists", refuse)
    assert native.choose("auto", Models(cache_dir=str(tmp_path)), HEADS) is None


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(KernelError, match="no such flag"):
        building.built(Models(cache_dir=str(tmp_path)), "avx512")


def test_what_others_can_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretends = tmp_path / "pretends"
    # What comes after -o is made.
    pretends.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    pretends.chmod(0o700)
    monkeypatch.setenv("CXX", str(pretends))
    models = Models(cache_dir=str(tmp_path))
    library = building.built(models, "avx512")
    library.chmod(0o777)
    with pytest.raises(KernelError, match="written by others"):
        building.built(models, "avx512")
    library.chmod(0o500)
    with pytest.raises(KernelError, match="loaded"):
        Kernel(building.built(models, "avx512"), "avx512")


@pytest.mark.parametrize("which", ISAS)
def test_shapes_it_does_not_know_are_refused(which: str) -> None:
    kernel = _kernel(which, HEADS)
    for changes in ({"size": 24}, {"size": 272}, {"dtype": torch.float16}):
        fields = {"heads": 6, "kv_heads": 2, "size": 32, "scale": 1.0, "dtype": torch.float32}
        assert not kernel.suits(Heads(**fields | changes))


@pytest.mark.parametrize("which", ISAS)
def test_wrong_results_are_noticed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernel(which, HEADS)
    honest = native.Step.attend

    def spoilt(self: native.Step, *tensors: torch.Tensor) -> torch.Tensor:
        return honest(self, *tensors) * 1.01

    monkeypatch.setattr(native.Step, "attend", spoilt)
    with pytest.raises(KernelError, match="wrong"):
        native.load(Models(), HEADS, which)
