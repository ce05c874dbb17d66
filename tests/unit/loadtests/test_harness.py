"""Statistics and verdicts of the benchmarks."""

from __future__ import annotations

import json
import math

import pytest

from loadtests.harness import Bar, conditions, median_ratio, percentile, report, table

AT_LEAST = Bar(figure="ratio", relation="at least", limit=4.0)
AT_MOST = Bar(figure="wait_ms", relation="at most", limit=50.0)


def test_ratios_are_taken_round_by_round_before_the_median() -> None:
    # The machine halved its speed for one round: each round's ratio stays 2.
    assert median_ratio([200, 100, 200], [100, 50, 100]) == 2.0
    # The median of each side alone would say 100 / 100.
    assert median_ratio([10, 100, 300], [100, 10, 100]) == 3.0


def test_one_odd_round_does_not_move_the_ratio() -> None:
    assert median_ratio([2, 2, 2, 2, 90], [1, 1, 1, 1, 1]) == 2.0


@pytest.mark.parametrize(("candidate", "baseline"), [([], []), ([1.0], [1.0, 2.0])])
def test_sides_without_equal_rounds_are_refused(
    candidate: list[float], baseline: list[float]
) -> None:
    with pytest.raises(ValueError, match="same number of rounds"):
        median_ratio(candidate, baseline)


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (50, 5), (51, 6), (90, 9), (100, 10)])
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], percent) == expected


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_percentile_refuses_what_has_no_answer(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile(values, percent)


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [
        (AT_LEAST, 4.0, True),
        (AT_LEAST, 3.999, False),
        (AT_MOST, 50.0, True),
        (AT_MOST, 50.001, False),
        (AT_LEAST, math.nan, False),
        (AT_MOST, math.nan, False),
    ],
)
def test_a_bar_holds_on_its_side_of_the_limit(bar: Bar, value: float, met: bool) -> None:
    assert bar.holds(value) is met
    assert bar.verdict(value).startswith("met" if met else "MISSED")


def test_the_report_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = report("queue", {"ratio": 4.56789, "wait_ms": 7.0}, [AT_LEAST, AT_MOST])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert json.loads(lines[-1]) == {"bench": "queue", "ratio": 4.568, "wait_ms": 7.0}
    assert sum(line.startswith("{") for line in lines) == 1


def test_a_missed_bar_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("queue", {"ratio": 9.0, "wait_ms": 51.0}, [AT_LEAST, AT_MOST]) == 1
    assert "MISSED: wait_ms" in capsys.readouterr().out


def test_rounding_does_not_help_over_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("queue", {"ratio": 3.99999}, [AT_LEAST]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 4.0


def test_a_table_is_markdown_with_padded_columns() -> None:
    assert table(["a", "long"], [["wide", 1], ["x", 22]]).splitlines() == [
        "| a    | long |",
        "|------|------|",
        "| wide | 1    |",
        "| x    | 22   |",
    ]


def test_conditions_name_machine_and_versions() -> None:
    shown = conditions("redis")
    assert "cores" in shown
    assert "Valkey 9" in shown
    assert "redis 8" in shown
