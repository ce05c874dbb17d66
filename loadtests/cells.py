"""Tenants on cells: rendezvous hashing, and how evenly it spreads them (docs/scaling.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def cell_of(tenant: str, cells: Sequence[str]) -> str:
    """The cell with the highest hash of its name and the tenant's.

    A cell that is added takes tenants from all others and moves no one else; one that is removed
    gives its own to the rest.
    """
    if not cells:
        raise ValueError("needs at least one cell")
    return max(cells, key=lambda cell: hashlib.blake2b(f"{cell}|{tenant}".encode()).digest())


def imbalance(load: Mapping[str, float], cells: Sequence[str]) -> float:
    """Load of the fullest cell over the mean; 1 is even. `load`: tenant -> its part."""
    sums = dict.fromkeys(cells, 0.0)
    for tenant, part in load.items():
        sums[cell_of(tenant, cells)] += part
    return max(sums.values()) / (sum(sums.values()) / len(cells))


def moved(tenants: Sequence[str], before: Sequence[str], after: Sequence[str]) -> float:
    """Part of the tenants that another list of cells puts elsewhere."""
    changed = sum(cell_of(tenant, before) != cell_of(tenant, after) for tenant in tenants)
    return changed / len(tenants)
