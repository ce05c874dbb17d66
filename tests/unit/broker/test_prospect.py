"""The start of a waiting job, foretold from a view of the queue."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from broker.drain import Drain
from broker.jobs import Band
from broker.pace import Pace
from broker.prospect import (
    BandView,
    Prospect,
    Rival,
    demand,
    job_tokens,
    position,
    start_in_s,
    tokens_per_s,
)

IDLE = BandView(waiting=0, demand=0.0)


def _view(**fields: Any) -> Prospect:
    values: dict[str, Any] = {
        "now_ms": 1_000,
        "band": Band.STANDARD,
        "tokens_per_s": 1_000.0,
        "own_tokens": 100.0,
        "mean_tokens": 100.0,
        "slot_tokens_per_s": 250.0,
        "bands": [IDLE, IDLE, IDLE],
        "own_demand": 0.0,
        "at": 0.0,
        "weight": 1.0,
        "default_weight": 1.0,
        "cap": 64,
        "running": 4,
        "rivals": [],
        **fields,
    }
    return Prospect(**values)


def _rival(**fields: Any) -> Rival:
    values: dict[str, Any] = {
        "at": 0.0,
        "weight": 1.0,
        "cap": 64,
        "waiting": 1_000,
        "running": 0,
        "tokens": 100.0,
        **fields,
    }
    return Rival(**values)


def test_alone_all_is_its_own() -> None:
    assert start_in_s(_view(), 9) == pytest.approx(0.95)
    assert start_in_s(_view(own_tokens=200.0), 9) == pytest.approx(1.85)


def test_nothing_measured_nothing_foretold() -> None:
    blank = _view(tokens_per_s=None)
    assert start_in_s(blank, 3) is None
    assert position(blank, 3).estimated_start_ms is None


def test_a_delayed_job_starts_after_it_is_due() -> None:
    assert position(_view(), 0, due_ms=7_000).estimated_start_ms == 7_050
    assert position(_view(), 0, due_ms=500).estimated_start_ms == 1_050


def test_rivals_take_their_turns_as_long_as_they_have_jobs() -> None:
    assert start_in_s(_view(rivals=[_rival()]), 10) == pytest.approx(2.05)
    assert start_in_s(_view(rivals=[_rival(weight=3.0)]), 10) == pytest.approx(4.05)
    assert start_in_s(_view(rivals=[_rival(weight=3.0, waiting=5)]), 10) == pytest.approx(1.55)
    # Ahead, or behind, in virtual time.
    assert start_in_s(_view(rivals=[_rival(at=1_000.0)]), 10) == pytest.approx(1.05)
    assert start_in_s(_view(rivals=[_rival(at=-500.0)]), 10) == pytest.approx(2.55)
    # One that stands for three.
    assert start_in_s(_view(rivals=[_rival(count=3.0)]), 10) == pytest.approx(4.05)


def test_caps_of_rivals_and_its_own() -> None:
    # Of four slots a rival has one: a quarter of what is done meanwhile.
    capped = [_rival(cap=1, running=1)]
    assert start_in_s(_view(rivals=capped), 30) == pytest.approx(4.05, abs=0.01)
    # One that it has not taken yet.
    capped = [_rival(cap=1)]
    assert start_in_s(_view(rivals=capped), 30) == pytest.approx(4.05 + 0.1 / 0.75, abs=0.01)
    # Its own: two slots, 5 jobs/s.
    assert start_in_s(_view(cap=2, running=2), 10) == pytest.approx(10.5 / 5)
    assert start_in_s(_view(cap=2, running=0), 10) == pytest.approx(8.5 / 5)
    # Where speed wasn't measured, caps say nothing.
    unknown = _view(cap=2, running=2, rivals=capped, slot_tokens_per_s=inf)
    assert start_in_s(unknown, 10) == pytest.approx(2.05)


def test_bands_take_what_comes_in_and_backlogs_their_shares() -> None:
    coming = BandView(waiting=0, demand=400.0)
    assert start_in_s(_view(bands=[coming, IDLE, IDLE]), 60) == pytest.approx(10.05)
    # More than its share of 75 in 95 isn't left to it.
    flood = BandView(waiting=0, demand=5_000.0)
    assert start_in_s(_view(bands=[flood, IDLE, IDLE]), 60) == pytest.approx(6 * 95 / 20 + 0.05)
    # A backlog of 100 jobs lasts for 12.67 s at 75/95 of all; then all is free.
    backlog = BandView(waiting=100, demand=0.0)
    lasts = 10 * 95 / 75
    assert start_in_s(_view(bands=[backlog, IDLE, IDLE]), 60) == pytest.approx(
        lasts + (6 - lasts * 20 / 95) + 0.05
    )
    # It goes on being fed.
    fed = BandView(waiting=100, demand=400.0)
    lasts = 10 / (75 / 95 - 0.4)
    assert start_in_s(_view(bands=[fed, IDLE, IDLE]), 100) == pytest.approx(
        lasts + (10 - lasts * 20 / 95) / 0.6 + 0.05
    )
    assert start_in_s(_view(bands=[coming, IDLE, backlog]), 60) == pytest.approx(
        6 / 0.6 / (20 / 25) + 0.05
    )


def test_who_keeps_coming_in_the_same_band_takes_a_turn_each() -> None:
    own_band = [IDLE, BandView(waiting=0, demand=300.0), IDLE]
    assert start_in_s(_view(bands=own_band), 70) == pytest.approx(10.05, abs=0.02)
    # Its own jobs of before aren't others'.
    assert start_in_s(_view(bands=own_band, own_demand=300.0), 70) == pytest.approx(7.05)
    # No more than one tenant's fair part, where the one is all that is known.
    own_band[1] = BandView(waiting=0, demand=900.0)
    assert start_in_s(_view(bands=own_band), 70) == pytest.approx(14.05)


def test_how_much_the_queue_gets_done() -> None:
    half_idle = Drain(100, 10_000, 50_000, 60_000)
    slots = Pace(tokens=500, spent_ms=10_000, peak=2.0)
    assert tokens_per_s(None, slots, 60_000, 60_000, 4) is None
    assert tokens_per_s(half_idle, slots, 60_000, 60_000, 2) == pytest.approx(200)
    assert tokens_per_s(half_idle, slots, 60_000, 60_000, 8) == pytest.approx(380)
    assert tokens_per_s(half_idle, replace(slots, peak=8.0), 60_000, 60_000, 2) == pytest.approx(
        380
    )
    assert tokens_per_s(half_idle, Pace(), 60_000, 60_000, 8) == pytest.approx(200)
    stuck = tokens_per_s(half_idle, slots, 240_000, 60_000, 8)
    assert stuck is not None
    assert stuck < 50


def test_how_fast_jobs_run() -> None:
    pace = Pace()
    assert pace.slot_tokens_per_s == inf
    for running in (3, 5, 2):
        pace = pace.after(100, 2_000, running)
    assert pace.slot_tokens_per_s == pytest.approx(50)
    assert pace.peak == pytest.approx(5.0, rel=0.01)
    assert Pace.unpack(pace.pack()) == pace
    for _ in range(1_000):
        pace = pace.after(100, 1_000, 1)
    assert pace.slot_tokens_per_s == pytest.approx(100, rel=0.01)
    assert pace.peak == 1.0


def test_what_measures_say_of_jobs() -> None:
    assert job_tokens(None, Drain(4, 100, 1_000, 0)) == 25
    assert job_tokens(None, None) == 1
    coming = Drain(10, 600, 60_000, 0)
    assert demand(None, 0) == 0
    assert demand(coming, 0) == pytest.approx(10)
    assert demand(coming, 120_000) == pytest.approx(1.353, rel=0.001)
    assert demand(coming, 600_000) < 0.01
