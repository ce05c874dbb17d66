"""Estimated starts are within the benchmark's bars where the machine plays no part."""

from __future__ import annotations

from loadtests.forecast import BARS, figures
from loadtests.forecast_ideal import measure


def test_estimates_keep_to_the_bars_on_an_ideal_machine() -> None:
    found = measure()
    measured = figures(found)
    assert all(measured[bar.figure] <= bar.limit for bar in BARS), measured
    assert measured["guesses"] > 2_000
    # None is hidden: everything that waited was told something.
    assert {errors.without for errors in found.values()} == {0}
