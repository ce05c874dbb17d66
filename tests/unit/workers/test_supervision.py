"""The watchdog, and the gate that lets suspects run alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from workers.supervision import Pulse, SoloGate, Watchdog


@dataclass
class _Engine:
    now: float = 0.0
    pulse: Pulse = field(default_factory=lambda: Pulse(alive=True, running=0, steps=0))

    def watchdog(self) -> Watchdog:
        return Watchdog(lambda: self.pulse, lambda _: None, stall_s=10, clock=lambda: self.now)


def test_steps_that_stand_still_while_requests_run() -> None:
    engine = _Engine()
    watchdog = engine.watchdog()
    engine.pulse = Pulse(alive=True, running=1, steps=5)
    assert watchdog.look() is None
    engine.now = 10
    assert watchdog.look() is None
    engine.now = 10.5
    assert watchdog.look() == "stalled"
    engine.pulse = Pulse(alive=True, running=1, steps=6)
    assert watchdog.look() is None


def test_an_idle_engine_is_well() -> None:
    engine = _Engine()
    watchdog = engine.watchdog()
    assert watchdog.look() is None
    engine.now = 1000
    assert watchdog.look() is None
    # The time it was idle doesn't count against the first request.
    engine.pulse = Pulse(alive=True, running=1, steps=0)
    engine.now = 1005
    assert watchdog.look() is None


def test_a_dead_loop() -> None:
    engine = _Engine(pulse=Pulse(alive=False, running=0, steps=0))
    assert engine.watchdog().look() == "died"


def test_the_thread_reports_and_lives_on_when_the_rebuild_fails() -> None:
    reports: list[str] = []
    twice = threading.Event()

    def on_dead(reason: str) -> None:
        reports.append(reason)
        if len(reports) == 2:
            twice.set()
        raise RuntimeError("can't be rebuilt")

    watchdog = Watchdog(
        lambda: Pulse(alive=False, running=0, steps=0), on_dead, stall_s=10, interval_s=0.001
    )
    watchdog.start()
    assert twice.wait(10)
    watchdog.stop()
    assert set(reports) == {"died"}


class _Visitor(threading.Thread):
    """Goes through the gate and stays inside until told to leave."""

    def __init__(self, gate: SoloGate, job_id: str) -> None:
        super().__init__(daemon=True)
        self.inside, self.leave = threading.Event(), threading.Event()
        self._gate, self._job_id = gate, job_id
        self.start()

    def run(self) -> None:
        with self._gate.enter(self._job_id):
            self.inside.set()
            self.leave.wait(10)


def test_ordinary_jobs_share_and_suspects_run_alone_in_turn() -> None:
    gate = SoloGate()
    gate.suspect("bad")
    first, second = _Visitor(gate, "a"), _Visitor(gate, "b")
    assert first.inside.wait(10)
    assert second.inside.wait(10)
    suspect = _Visitor(gate, "bad")
    assert not suspect.inside.wait(0.05)
    late = _Visitor(gate, "c")
    # Whoever comes after a waiting suspect waits for it.
    assert not late.inside.wait(0.05)
    first.leave.set()
    second.leave.set()
    assert suspect.inside.wait(10)
    assert not late.inside.is_set()
    suspect.leave.set()
    assert late.inside.wait(10)
    late.leave.set()
    # It got through alone, so it is no suspect any more.
    again, other = _Visitor(gate, "bad"), _Visitor(gate, "d")
    assert again.inside.wait(10)
    assert other.inside.wait(10)
    again.leave.set()
    other.leave.set()
