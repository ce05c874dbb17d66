"""Arithmetic of fair shares."""

from __future__ import annotations

import pytest

from loadtests.shares import (
    GapMeter,
    jain,
    normalised,
    share_error,
    vtc_bound,
    while_backlogged,
)

WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}


def test_jain_is_one_for_equals_and_one_over_n_for_a_monopoly() -> None:
    assert jain([5.0, 5.0, 5.0, 5.0]) == pytest.approx(1.0)
    assert jain([8.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 0.5, 0.25]) == pytest.approx(1.75**2 / (3 * 1.3125))


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_jain_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="above zero"):
        jain(values)


def test_service_is_normalised_by_weight() -> None:
    assert normalised({"one": 10, "two": 20, "four": 40}, WEIGHTS) == [10.0, 10.0, 10.0]


def test_share_error_is_relative_to_the_share_that_is_due() -> None:
    assert share_error({"one": 100, "two": 200, "four": 400}, WEIGHTS) == pytest.approx(0.0)
    # "one" is due 1/7 of 700 and has 110 of them; the others lack less of theirs.
    served = {"one": 110, "two": 195, "four": 395}
    assert share_error(served, WEIGHTS) == pytest.approx(0.10)


@pytest.mark.parametrize("judge", [normalised, share_error])
def test_tenants_must_be_the_same(judge: object) -> None:
    assert callable(judge)
    with pytest.raises(ValueError, match="same tenants"):
        judge({"one": 1.0}, WEIGHTS)
    with pytest.raises(ValueError, match="same tenants"):
        judge({}, {})


def test_nothing_served_has_no_shares() -> None:
    with pytest.raises(ValueError, match="nothing was served"):
        share_error(dict.fromkeys(WEIGHTS, 0.0), WEIGHTS)


def test_the_gap_is_the_largest_of_any_interval() -> None:
    meter = GapMeter({"a": 1.0, "b": 2.0})
    # Normalised a - b: 10, then 5, then -5: the interval from the first to the last has 15.
    for service in ({"a": 10, "b": 0}, {"a": 10, "b": 10}, {"a": 10, "b": 30}):
        meter.look(service)
    assert meter.gap == pytest.approx(15.0)


def test_the_bound_takes_the_larger_term() -> None:
    assert vtc_bound(200, 3_000) == 6_000.0
    assert vtc_bound(4_000, 3_000) == 8_000.0


def test_only_starts_while_all_had_work_count() -> None:
    starts = {"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0, 8.0]}
    assert while_backlogged(starts) == {"a": 3.0, "b": 1.0}
