"""The arithmetic of `loadtests.forecast`."""

from __future__ import annotations

import pytest

from loadtests.forecast import Errors, figures, row


def test_each_load_counts_alike_and_one_without_long_waits_not_at_all() -> None:
    found = {
        "many": Errors(relative=[-0.1] * 99 + [2.0]),
        "few": Errors(relative=[0.3, -0.5]),
        "none": Errors(short_ms=[5.0]),
    }
    judged = figures(found)
    assert judged["error_p50"] == pytest.approx((0.1 + 0.3) / 2)
    assert judged["error_p90"] == pytest.approx((0.1 + 0.5) / 2)
    assert judged["bias"] == pytest.approx((-0.1 - 0.1) / 2)
    assert judged["guesses"] == 102


def test_a_row_tells_sizes_and_the_signed_median() -> None:
    errors = Errors(relative=[-0.5, -0.2, 0.1], at_submit=[0.4], short_ms=[-20.0], without=1)
    assert row("x", errors) == ["x", "3", "40% / 40%", "20% / 50%", "-20%", "1", "20 / 20", "1"]
    assert row("x", Errors())[2:5] == ["-", "-", "-"]
