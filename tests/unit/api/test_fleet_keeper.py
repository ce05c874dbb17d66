"""A launcher and its workers, which are small programs here; the queue is in memory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from api.cli.backoff import Backoff
from api.cli.fleet import keeper, watching
from api.cli.fleet.keeper import Fleet
from api.cli.fleet.metrics import FleetMetrics
from api.cli.fleet.placement import Place
from api.cli.merged_log import MergedLog
from broker.jobs import Band, NewJob, Status
from broker.memory import MemoryQueue
from broker.stats import WorkerStatus
from config.settings import Queue, Settings

HERE = socket.gethostname()
#: Workers by model: they wait, end at once, or ignore SIGTERM.
PROGRAMS = {
    "good": "import time; time.sleep(600)",
    "broken": "raise SystemExit(3)",
}


class _Quick(Backoff):
    def __init__(self) -> None:
        super().__init__(first_s=0.01, longest_s=0.02)


class _Lines(MergedLog):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, name: str, line: str | bytes) -> None:
        self.lines.append(line.decode() if isinstance(line, bytes) else line)


@dataclass
class Lab:
    """A fleet, its queue, and words put into its workers' mouths."""

    fleet: Fleet
    queue: MemoryQueue
    log: _Lines
    registry: CollectorRegistry
    said: dict[int, dict[str, Any]] = field(default_factory=dict)

    def pids(self) -> dict[str, int]:
        return {name: pid for pid, name in self.fleet._supervisor.running().items()}

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"forebay_fleet_{name}", labels) or 0.0

    def says(self, pid: int, model: str = "good", **more: Any) -> None:
        fields: dict[str, Any] = {
            "owner": f"{HERE}:{pid}:x", "queue": model, "hostname": HERE, "pid": pid,
            "engine": "e", "state": "ready", "capacity": 4, "jobs": 0, "steps": 1,
            "started_ms": 0, "seen_ms": 0,
        }  # fmt: skip
        self.queue.heartbeat(WorkerStatus(**fields | more), ttl_s=60)

    async def until(self, done: Callable[[], object], what: str) -> None:
        async def wait() -> None:
            while not done():
                await asyncio.sleep(0.01)

        try:
            await asyncio.wait_for(wait(), 20)
        except TimeoutError:
            raise AssertionError(f"{what}: not within 20 s; {self.log.lines[-10:]}") from None


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    def python(_module: str, *arguments: str, interpreter: str) -> list[str]:
        assert interpreter == ""
        return [sys.executable, "-S", "-c", PROGRAMS[arguments[1]]]

    monkeypatch.setattr(keeper, "python", python)
    for module in (keeper, watching):
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.02)
    settings = Settings(_env_file=None, worker={"stall_s": 0.2, "grace_s": 5})
    registry = CollectorRegistry()
    queue, log = MemoryQueue(Queue()), _Lines()
    fleet = Fleet(
        settings, queue, environment={}, log=log, metrics=FleetMetrics(registry), backoff=_Quick
    )
    watching_task = asyncio.create_task(fleet.watch())
    yield Lab(fleet, queue, log, registry)
    watching_task.cancel()
    await fleet.kill()
    await fleet.stop()


def _place(model: str, name: str = "") -> Place:
    return Place(name=name or model, model=model)


async def test_one_that_fails_is_told_of_and_the_other_is_left_alone(lab: Lab) -> None:
    lab.fleet.start([_place("good"), _place("broken")])
    await lab.until(lambda: "worker-good" in lab.pids(), "start")
    pid = lab.pids()["worker-good"]
    await lab.until(lambda: lab.queue.workers(), "word of the failing one")
    (failing,) = lab.queue.workers()
    assert (failing.state, failing.queue, failing.capacity) == ("failing", "broken", 0)
    assert lab.count("failing_workers", model="broken") == 1
    assert lab.count("failing_workers", model="good") == 0
    assert lab.count("worker_ends_total", model="broken") >= 3
    assert lab.pids()["worker-good"] == pid
    assert any("worker-broken (pid" in line and "status 3" in line for line in lab.log.lines)


async def test_one_that_stands_still_is_taken_out_and_its_jobs_go_back(lab: Lab) -> None:
    lab.fleet.start([_place("good")])
    await lab.until(lambda: lab.pids(), "start")
    (pid,) = lab.pids().values()
    job = NewJob(tenant="t", model="good", endpoint="/v1/embeddings", body=b"{}", band=Band.BATCH)
    lab.queue.enqueue(job)
    assert lab.queue.claim("good", f"{HERE}:{pid}:x")
    lab.says(pid, jobs=1)
    await lab.until(lambda: lab.pids() and pid not in lab.pids().values(), "a new process")
    assert lab.count("workers_taken_out_total", model="good", reason="stalled") == 1
    assert lab.queue.get(job.id).status is Status.QUEUED
    assert lab.queue.workers() == []
    assert any("stands still with 1 jobs" in line for line in lab.log.lines)


async def test_a_swap_waits_for_the_new_one(lab: Lab) -> None:
    lab.fleet.start([_place("good")])
    await lab.until(lambda: lab.pids(), "start")
    old = lab.pids()["worker-good"]
    swap = asyncio.create_task(lab.fleet.swap([_place("good"), _place("good", "added")]))
    await lab.until(lambda: "worker-good.2" in lab.pids(), "the new one")
    new = lab.pids()["worker-good.2"]
    lab.says(new, state="warming")
    await lab.until(lambda: lab.queue.workers(), "its word")
    assert lab.pids()["worker-good"] == old
    lab.says(new, state="ready")
    assert await asyncio.wait_for(swap, 20)
    assert lab.pids()["worker-good.2"] == new
    assert "worker-good" not in lab.pids()
    assert lab.count("worker_swaps_total", model="good", outcome="done") == 1
    # What has no place any more goes.
    await lab.until(lambda: "worker-added" in lab.pids(), "the added one")
    swap = asyncio.create_task(lab.fleet.swap([]))
    assert await asyncio.wait_for(swap, 20)
    assert lab.pids() == {}


async def test_a_new_one_that_fails_leaves_the_old_one_at_work(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.fleet.start([_place("good")])
    await lab.until(lambda: lab.pids(), "start")
    old = lab.pids()
    monkeypatch.setitem(PROGRAMS, "good", PROGRAMS["broken"])
    assert not await asyncio.wait_for(lab.fleet.swap([_place("good")]), 20)
    assert lab.pids() == old
    assert lab.count("worker_swaps_total", model="good", outcome="failed") == 1


async def test_killing_gives_jobs_back_at_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setitem(PROGRAMS, "good", deaf)
    lab.fleet.start([_place("good")])
    await lab.until(lambda: lab.pids(), "start")
    (pid,) = lab.pids().values()
    job = NewJob(tenant="t", model="good", endpoint="/v1/embeddings", body=b"{}")
    lab.queue.enqueue(job)
    assert lab.queue.claim("good", f"{HERE}:{pid}:x")
    lab.says(pid)
    draining = asyncio.create_task(lab.fleet.stop())
    await asyncio.sleep(0)
    await lab.fleet.kill()
    await asyncio.wait_for(draining, 3)
    assert lab.queue.get(job.id).status is Status.QUEUED
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
