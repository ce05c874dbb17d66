"""What a step may take of prompts, learnt from steps."""

from __future__ import annotations

import random

import pytest

from workers.engines.pacing import Pace, price


def _run(
    pace: Pace, *, base_s: float, rate_s: float, steps: int, noise: float = 0.0
) -> list[float]:
    """Seconds of steps that take what `pace` allows on a machine with these costs."""
    chance = random.Random(3)
    taken = []
    for step in range(steps):
        work = 0.0 if step % 5 == 0 else pace.work()
        seconds = (base_s + work * rate_s) * (1 + noise * chance.random())
        pace.observe(work, seconds)
        if work:
            taken.append(seconds)
    return taken


@pytest.mark.parametrize("rate_s", [0.0001, 0.0006, 0.003])
@pytest.mark.parametrize("base_s", [0.01, 0.05])
def test_steps_come_to_last_as_long_as_they_may(base_s: float, rate_s: float) -> None:
    pace = Pace(target_s=0.1)
    steps = _run(pace, base_s=base_s, rate_s=rate_s, steps=200)
    assert steps[-20:] == pytest.approx([0.1] * 20, rel=0.1)


def test_a_machine_that_slows_down_and_recovers_is_followed() -> None:
    pace = Pace(target_s=0.1)
    before = _run(pace, base_s=0.03, rate_s=0.0005, steps=100)[-1]
    slow = _run(pace, base_s=0.06, rate_s=0.0015, steps=100)
    after = _run(pace, base_s=0.03, rate_s=0.0005, steps=200)[-1]
    assert slow[0] > 0.15
    assert slow[-1] == pytest.approx(0.1, rel=0.15)
    assert after == pytest.approx(before, rel=0.15)


def test_noise_does_not_close_the_door() -> None:
    pace = Pace(target_s=0.1)
    steps = _run(pace, base_s=0.03, rate_s=0.0005, steps=400, noise=0.5)
    assert max(steps[-100:]) < 0.15
    assert min(steps[-100:]) > 0.05


def test_one_step_that_was_held_up_says_little() -> None:
    pace = Pace(target_s=0.1)
    _run(pace, base_s=0.03, rate_s=0.0005, steps=200)
    before = pace.work()
    pace.observe(before, 30.0)
    assert pace.work() > 0.7 * before


def test_answers_that_take_all_the_time_leave_none() -> None:
    pace = Pace(target_s=0.1)
    for _ in range(50):
        pace.observe(0.0, 0.2)
    assert pace.work() == 0


def test_later_tokens_of_a_prompt_cost_more() -> None:
    prices = [price(before) for before in range(0, 8000, 500)]
    assert prices[0] == 1
    assert prices == sorted(prices)
    assert prices[-1] > 2
