"""Reduced precision only where it was seen to do no harm: checked on samples at every load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from config.logs import get_logger

log = get_logger(__name__)

Sample = TypeVar("Sample")
#: A model and inputs of one batch into a row of numbers for each of them.
Compute = Callable[[Any, Sequence[Sample]], "np.ndarray[Any, Any]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far outputs may be off, and how that is measured: the worst row counts."""

    distance: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]
    #: From float32.
    precision: float
    #: Of an input in a batch from the same one alone.
    company: float


def cosine_distance(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """1 - cosine of the two rows that are furthest from each other."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float((1 - (one * other).sum(axis=-1) / lengths).max())


def largest_difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one - other).max())


def settle(
    load: Callable[[torch.dtype], Any],
    wanted: torch.dtype,
    compute: Compute[Sample],
    samples: Sequence[Sample],
    tolerance: Tolerance,
    *,
    insist: bool,
) -> Any:
    """What `load` gives in the wanted precision, or in float32 where that bends its outputs.

    `insist` keeps the wanted one all the same: the catalogue names it.
    """
    exact = load(torch.float32)
    if wanted is torch.float32:
        return exact
    reference = compute(exact, samples)
    reduced = load(wanted)
    together = compute(reduced, samples)
    alone = np.concatenate([compute(reduced, [sample]) for sample in samples])
    off = tolerance.distance(reference, together)
    company = tolerance.distance(together, alone)
    # A NaN is within no bound.
    good = off <= tolerance.precision and company <= tolerance.company
    figures = {
        "dtype": str(wanted).removeprefix("torch."),
        "off_float32": float(f"{off:.3g}"),
        "off_alone": float(f"{company:.3g}"),
    }
    if good or insist:
        log.info("precision_checked", **figures)
        return reduced
    log.warning("precision_refused", **figures)
    return exact
