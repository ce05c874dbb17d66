"""Tenants spread over cells."""

from __future__ import annotations

import pytest

from loadtests.cells import cell_of, imbalance, moved

CELLS = ("a", "b", "c")
TENANTS = [f"tenant-{number}" for number in range(2_000)]


def test_the_order_of_cells_does_not_matter() -> None:
    assert all(cell_of(name, CELLS) == cell_of(name, CELLS[::-1]) for name in TENANTS)


def test_many_tenants_spread_evenly() -> None:
    assert imbalance(dict.fromkeys(TENANTS, 1.0), CELLS) < 1.1


def test_one_heavy_tenant_is_on_one_cell() -> None:
    assert imbalance({"heavy": 1.0}, CELLS) == pytest.approx(3.0)


def test_a_new_cell_takes_its_part_and_moves_no_one_else() -> None:
    after = (*CELLS, "d")
    assert 0.2 < moved(TENANTS, CELLS, after) < 0.3
    for name in TENANTS:
        assert cell_of(name, after) in (cell_of(name, CELLS), "d")


def test_no_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        cell_of("tenant", ())
