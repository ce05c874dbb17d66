"""Which workers count as standing still."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from api.cli.fleet.judge import Judge
from broker.stats import WorkerStatus

HERE = socket.gethostname()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _said(pid: int = 7, **more: Any) -> WorkerStatus:
    fields: dict[str, Any] = {
        "owner": f"{HERE}:{pid}:x", "queue": "m", "hostname": HERE, "pid": pid, "engine": "e",
        "state": "ready", "capacity": 4, "jobs": 2, "steps": 10, "started_ms": 0, "seen_ms": 0,
    }  # fmt: skip
    return WorkerStatus(**fields | more)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def judge(clock: Clock) -> Judge:
    return Judge(stall_s=30, silent_s=10, clock=clock)


def _after(judge: Judge, clock: Clock, seconds: float, *said: WorkerStatus) -> list[str]:
    clock.now += seconds
    return [verdict.reason for verdict in judge.look(said, {7})]


def test_jobs_and_no_steps(judge: Judge, clock: Clock) -> None:
    assert _after(judge, clock, 0, _said()) == []
    assert _after(judge, clock, 30, _said()) == []
    clock.now += 1
    (verdict,) = judge.look([_said()], {7})
    assert (verdict.pid, verdict.reason, verdict.jobs) == (7, "stalled", 2)
    # Said once: the next process by that number begins anew.
    assert _after(judge, clock, 1, _said()) == []


@pytest.mark.parametrize("change", [{"steps": 11}, {"jobs": 0}, {"owner": "another"}])
def test_what_gets_on_is_left_alone(judge: Judge, clock: Clock, change: dict[str, Any]) -> None:
    assert _after(judge, clock, 0, _said()) == []
    assert _after(judge, clock, 29, _said(**change)) == []
    assert _after(judge, clock, 29, _said(**change)) == []


def test_jobs_that_wait_for_others_answers_take_no_steps(judge: Judge, clock: Clock) -> None:
    for _ in range(3):
        assert _after(judge, clock, 29, _said(waiting=2)) == []
    assert _after(judge, clock, 31, _said(waiting=1)) == ["stalled"]


def test_a_start_may_take_long(judge: Judge, clock: Clock) -> None:
    for state in ("fetching", "loading", "warming"):
        assert _after(judge, clock, 31, _said(state=state, steps=0)) == []


def test_one_that_drains_is_watched_too(judge: Judge, clock: Clock) -> None:
    assert _after(judge, clock, 0, _said(state="draining")) == []
    assert _after(judge, clock, 31, _said(state="draining")) == ["stalled"]


def test_silence(judge: Judge, clock: Clock) -> None:
    assert _after(judge, clock, 0, _said()) == []
    assert _after(judge, clock, 50) == []
    assert _after(judge, clock, 9, _said()) == []
    assert _after(judge, clock, 1) == []
    assert _after(judge, clock, 11) == ["silent"]
    assert _after(judge, clock, 11) == []


def test_what_never_spoke_is_still_starting(judge: Judge, clock: Clock) -> None:
    assert [_after(judge, clock, 100) for _ in range(3)] == [[], [], []]


def test_while_nobody_can_be_heard_nobody_is_judged(judge: Judge, clock: Clock) -> None:
    assert _after(judge, clock, 0, _said()) == []
    clock.now += 100
    judge.excuse()
    assert _after(judge, clock, 0) == []
    assert _after(judge, clock, 0, _said()) == []
    assert _after(judge, clock, 29, _said()) == []


def test_workers_of_others_are_not_ours(judge: Judge, clock: Clock) -> None:
    for others in (_said(hostname="elsewhere"), _said(pid=8)):
        assert _after(judge, clock, 0, others) == []
        assert _after(judge, clock, 31, others) == []
