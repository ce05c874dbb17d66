"""Which precision a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from workers.engines.precision import Tolerance, cosine_distance, largest_difference, settle

TOLERANCE = Tolerance(distance=cosine_distance, precision=1e-3, company=1e-4)


def _settled(*, bend: float = 0.0, company: float = 0.0, insist: bool = False) -> Any:
    """With a model whose vectors in bfloat16 are bent, and bent by company."""

    def compute(model: torch.dtype, samples: Sequence[int]) -> Any:
        off = 0.0 if model is torch.float32 else bend + (company if len(samples) > 1 else 0)
        return np.array([[1.0, off + sample] for sample in samples], dtype=np.float32)

    return settle(lambda dtype: dtype, torch.bfloat16, compute, [0, 1, 2], TOLERANCE, insist=insist)


def test_reduced_precision_that_does_no_harm() -> None:
    assert _settled() is torch.bfloat16
    assert _settled(bend=0.03) is torch.bfloat16


@pytest.mark.parametrize("harm", [{"bend": 0.06}, {"company": 0.02}, {"bend": float("nan")}])
def test_what_bends_is_refused_unless_the_catalogue_insists(harm: dict[str, float]) -> None:
    assert _settled(**harm) is torch.float32
    assert _settled(**harm, insist=True) is torch.bfloat16


def test_float32_needs_no_check() -> None:
    def compute(model: Any, samples: Any) -> Any:
        raise AssertionError

    assert (
        settle(lambda dtype: dtype, torch.float32, compute, [1], TOLERANCE, insist=False)
        is torch.float32
    )


def test_distances() -> None:
    one, other = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert cosine_distance(one, other) == pytest.approx(1 - 2**-0.5)
    assert largest_difference(one, other) == 1.0
