"""The specification by itself."""

from __future__ import annotations

import pytest

from broker.fairness import FairShare
from broker.jobs import BANDS, Band

HIGH, MIDDLE, LOW = BANDS


def _run(fair: FairShare, starts: int, cost: int = 10, **weights: float) -> list[str]:
    """Tenants in the order of their starts; all of them stay backlogged."""
    order = []
    for _ in range(starts):
        choice = fair.choose(lambda band, tenant: cost)
        assert choice is not None
        band, tenant = choice
        fair.start(band, tenant, cost, weights.get(tenant, 1.0))
        order.append(tenant)
    return order


def test_nobody_to_choose() -> None:
    fair = FairShare()
    assert fair.choose(lambda band, tenant: 1) is None
    fair.join(HIGH, "a")
    fair.leave(HIGH, "a")
    assert fair.choose(lambda band, tenant: 1) is None


def test_equals_take_turns_and_ties_go_by_name() -> None:
    fair = FairShare()
    for tenant in ("b", "a", "c"):
        fair.join(HIGH, tenant)
    assert _run(fair, 6) == ["a", "b", "c", "a", "b", "c"]


def test_weights_are_kept_exactly_over_a_round() -> None:
    fair = FairShare()
    for tenant in ("a", "b"):
        fair.join(HIGH, tenant)
    order = _run(fair, 40, a=1.0, b=3.0)
    assert (order.count("a"), order.count("b")) == (10, 30)


def test_a_newcomer_starts_at_the_clock() -> None:
    fair = FairShare()
    fair.join(HIGH, "elder")
    _run(fair, 100)
    fair.join(HIGH, "young")
    assert fair.bands[HIGH].active["young"] == fair.bands[HIGH].clock > 0
    assert _run(fair, 4) == ["young", "elder", "young", "elder"]


def test_a_tenant_that_leaves_keeps_what_it_has_used() -> None:
    fair = FairShare()
    for tenant in ("a", "b"):
        fair.join(HIGH, tenant)
    assert _run(fair, 1, cost=1_000) == ["a"]
    fair.leave(HIGH, "a")
    fair.join(HIGH, "a")
    assert _run(fair, 5, cost=100) == ["b"] * 5


def test_a_charge_is_corrected_upwards_and_downwards() -> None:
    fair = FairShare()
    fair.join(HIGH, "a")
    _run(fair, 1, cost=100)
    fair.settle(HIGH, "a", 60, 100, 2.0)
    assert fair.bands[HIGH].active["a"] == 80
    fair.settle(HIGH, "a", 110, 100, 1.0)
    assert fair.bands[HIGH].active["a"] == 90


def test_a_refund_reaches_below_the_clock_by_what_was_taken_at_most() -> None:
    fair = FairShare()
    fair.join(HIGH, "a")
    _run(fair, 3, cost=100)
    assert fair.bands[HIGH].clock == 200
    fair.settle(HIGH, "a", 30, 280, 2.0)
    assert fair.bands[HIGH].active["a"] == 200 - 15
    fair.settle(HIGH, "a", 10, 100, 1.0)
    assert fair.bands[HIGH].active["a"] == 185, "what is below already stays"
    fair.settle(HIGH, "a", 0, 50, 1.0)
    assert fair.bands[HIGH].active["a"] == 185


def test_credit_ends_with_the_race() -> None:
    fair = FairShare()
    fair.join(HIGH, "a")
    _run(fair, 3, cost=100)
    fair.settle(HIGH, "a", 30, 280, 1.0)
    fair.leave(HIGH, "a")
    fair.join(HIGH, "a")
    assert fair.bands[HIGH].active["a"] == fair.bands[HIGH].clock


def test_a_start_is_charged_what_the_tenants_jobs_take() -> None:
    fair = FairShare()
    for tenant in ("frugal", "greedy", "newcomer"):
        fair.join(HIGH, tenant)
    fair.learn("frugal", 100, 10)
    fair.learn("greedy", 100, 100)
    assert fair.start(HIGH, "frugal", 100, 1.0) == pytest.approx(10)
    assert fair.start(HIGH, "greedy", 100, 1.0) == pytest.approx(100)
    assert fair.start(HIGH, "newcomer", 100, 1.0) == pytest.approx(55, abs=1)


def test_a_bands_debt_is_settled_with_what_its_jobs_took() -> None:
    fair = FairShare()
    fair.join(HIGH, "h")
    fair.join(LOW, "l")
    fair.start(LOW, "l", 800, 1.0)
    assert fair.bands[LOW].lag == pytest.approx(-750)
    fair.settle(LOW, "l", 80, 800, 1.0)
    fair.balance()
    assert fair.bands[LOW].lag == pytest.approx(-75)
    assert fair.bands[HIGH].lag == pytest.approx(75)
    fair.balance()
    assert fair.bands[LOW].lag == pytest.approx(-75), "once"


def test_a_debt_settled_after_the_band_has_emptied_is_others_alone() -> None:
    fair = FairShare()
    for band in BANDS:
        fair.join(band, "a")
    fair.start(LOW, "a", 100, 1.0)
    fair.leave(LOW, "a")
    before = [fair.bands[band].lag for band in BANDS]
    fair.settle(LOW, "a", 200, 100, 1.0)
    fair.balance()
    after = [fair.bands[band].lag for band in BANDS]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([75, 20, 0])


def test_a_band_without_room_is_neither_chosen_nor_owed() -> None:
    fair = FairShare()
    fair.join(LOW, "l")
    assert fair.choose(lambda band, tenant: 1, full=[LOW]) is None
    fair.join(HIGH, "h")
    fair.bands[LOW].lag = 1_000.0
    assert fair.choose(lambda band, tenant: 1) == (LOW, "l")
    assert fair.choose(lambda band, tenant: 1, full=[LOW]) == (HIGH, "h")
    fair.start(HIGH, "h", 100, 1.0, full=[LOW])
    assert (fair.bands[LOW].lag, fair.bands[HIGH].lag) == (1_000.0, 0.0)


def test_a_tenant_out_of_the_race_is_charged_too() -> None:
    fair = FairShare()
    fair.settle(HIGH, "a", 150, 100, 1.0)
    fair.settle(HIGH, "b", 50, 100, 1.0)
    assert fair.bands[HIGH].idle == {"a": 50}


def test_a_lower_band_waits_until_it_is_owed_its_next_job() -> None:
    fair = FairShare()
    fair.join(HIGH, "h")
    fair.join(LOW, "l")
    order = []
    for _ in range(64):
        choice = fair.choose(lambda band, tenant: 10 if band is HIGH else 30)
        assert choice is not None
        order.append(choice[0])
        fair.start(*choice, 10 if choice[0] is HIGH else 30, 1.0)
    first = order.index(LOW)
    # The low band is owed 10 * .05 / .80 per start of the high one.
    assert first == 48
    assert order.count(LOW) == 1


@pytest.mark.parametrize("band", BANDS)
def test_a_band_that_empties_is_owed_nothing(band: Band) -> None:
    fair = FairShare()
    for each in BANDS:
        fair.join(each, "a")
    _run(fair, 3)
    fair.leave(band, "a")
    assert fair.bands[band].lag == 0


def test_a_lonely_band_runs_up_no_debt() -> None:
    fair = FairShare()
    fair.join(LOW, "a")
    _run(fair, 10)
    assert fair.bands[LOW].lag == 0


def test_the_band_that_is_owed_most_for_its_share_goes_first() -> None:
    fair = FairShare()
    for band in BANDS:
        fair.join(band, f"{band}")
    fair.bands[MIDDLE].lag, fair.bands[LOW].lag = 100.0, 50.0
    assert fair.choose(lambda band, tenant: 10) == (LOW, "batch")
    assert fair.choose(lambda band, tenant: 60) == (MIDDLE, "standard")
    assert fair.choose(lambda band, tenant: 600) == (HIGH, "interactive")
