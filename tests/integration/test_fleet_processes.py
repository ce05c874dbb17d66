"""`forebay workers start` with real workers: swapped under load, stopped dead, drained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson
import psutil
import pytest

from api.cli.ports import claim_port
from broker.connections import connect
from broker.jobs import NewJob, Status
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from config.settings import Queue, Redis
from tests.apiserver import CHAT
from tests.integration.worker_lab import ROOT, until

#: Runs on every processor there is, in a group that has no device: the simulated engine.
START = [sys.executable, "-m", "api.cli", "workers", "start", "--engine", "simulated"]


class Launcher:
    """One `forebay workers start` and the queue it serves."""

    def __init__(self, url: str, folder: Path, **env: str) -> None:
        self.queue = RedisQueue(connect(Redis(url=url)), Queue(lease_ttl_s=5))
        self.port = claim_port("127.0.0.1", 0)
        self._log = folder / "launcher.log"
        clean = {name: value for name, value in os.environ.items() if "FOREBAY" not in name}
        clean |= {
            "PYTHONPATH": str(ROOT),
            "FOREBAY_REDIS__URL": url,
            "FOREBAY_QUEUE__LEASE_TTL_S": "5",
            "FOREBAY_QUEUE__RENEW_EVERY_S": "0.25",
            "FOREBAY_WORKER__METRICS_PORT": str(self.port),
            "FOREBAY_SIMULATED__STEP_MS": "10",
            "FOREBAY_LOG__FORMAT": "json",
        }
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*START, "--models", CHAT], cwd=folder, env=clean | env, stderr=stream
            )

    def ready(self) -> WorkerStatus:
        """The worker, once there is exactly one and it is ready."""
        until(lambda: [each.state for each in self.workers()] == ["ready"], "one ready worker")
        return self.workers()[0]

    def workers(self) -> list[WorkerStatus]:
        return self.queue.workers()

    def put(self, count: int, *, max_tokens: int, attempts: int = 3) -> list[str]:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens}
        jobs = [
            NewJob(
                tenant="t",
                model=CHAT,
                endpoint="/v1/chat/completions",
                body=orjson.dumps(body),
                max_attempts=attempts,
            )
            for _ in range(count)
        ]
        for job in jobs:
            self.queue.enqueue(job)
        return [job.id for job in jobs]

    def await_end(self, job_ids: list[str]) -> None:
        until(lambda: all(self.queue.get(each).is_terminal for each in job_ids), "end of the jobs")

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(10)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture
def launcher(valkey: str, tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(valkey, tmp_path)
    yield made
    made.close()


def test_a_worker_is_swapped_under_load_and_no_job_notices(launcher: Launcher) -> None:
    old = launcher.ready()
    assert old.place == "cpu"
    jobs = launcher.put(40, max_tokens=40)
    until(lambda: launcher.queue.stats(CHAT).in_flight, "jobs run")
    launcher.process.send_signal(signal.SIGUSR1)
    seen: set[int] = set()

    def replaced() -> bool:
        now = launcher.workers()
        ready = {each.pid for each in now if each.state == "ready"}
        # At every moment somebody is ready.
        assert ready, [(each.pid, each.state) for each in now]
        seen.update(ready)
        if not all(launcher.queue.get(each).is_terminal for each in jobs[-5:]):
            launcher.put(1, max_tokens=1)
        return old.pid not in {each.pid for each in now}

    until(replaced, "the old one is gone")
    jobs += launcher.put(5, max_tokens=4)
    launcher.await_end(jobs)
    assert {launcher.queue.get(each).status for each in jobs} == {Status.COMPLETED}
    # Not one was started twice: the old worker finished what it had.
    assert {launcher.queue.get(each).attempt for each in jobs} == {1}
    new = launcher.ready()
    assert seen == {old.pid, new.pid}
    # Counted once the old process is gone, which is after its last word.
    done = f'forebay_fleet_worker_swaps_total{{model="{CHAT}",outcome="done"}} 1.0'
    until(lambda: done in launcher.metrics(), "the swap is counted")
    text = launcher.metrics()
    # The old worker's jobs are still counted.
    assert sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("forebay_workers_jobs_total{") and 'status="completed"' in line
    ) >= len(jobs)
    # A drain waits for what runs; asked again, it doesn't, and the job goes back.
    (long,) = launcher.put(1, max_tokens=1000)
    until(lambda: launcher.queue.get(long).status is Status.IN_PROGRESS, "it runs")
    launcher.process.send_signal(signal.SIGTERM)
    until(lambda: "drain_started" in launcher.log(), "it drains")
    until(lambda: _asked_again(launcher), "the launcher ends")
    assert launcher.process.wait(20) == 0
    assert launcher.queue.get(long).status is Status.QUEUED
    assert launcher.workers() == []
    assert not psutil.pid_exists(new.pid)
    # Nothing stands before the JSON of the workers, nor of the launcher.
    lines = [line for line in launcher.log().splitlines() if line.startswith("{")]
    events = {json.loads(line)["event"] for line in lines}
    assert events >= {"launcher_reported", "worker_ready", "worker_stopped"}


def test_one_that_stands_still_is_replaced(valkey: str, tmp_path: Path) -> None:
    """Its steps take ten minutes, which it doesn't find remarkable itself."""
    launcher = Launcher(
        valkey, tmp_path, FOREBAY_SIMULATED__STEP_MS="600000", FOREBAY_WORKER__STALL_S="0.5"
    )
    try:
        old = launcher.ready()
        (job,) = launcher.put(1, max_tokens=4, attempts=1)
        launcher.await_end([job])
        assert launcher.queue.get(job).status is Status.FAILED
        until(lambda: launcher.ready().pid != old.pid, "another process")
        assert 'workers_taken_out_total{model="smollm2-135m",reason="stalled"} 1.0' in (
            launcher.metrics()
        )
        if not os.environ.get("CHAOS"):
            return
        # One that can't say anything any more is taken out, too.
        pid = launcher.ready().pid
        os.kill(pid, signal.SIGSTOP)
        until(lambda: not psutil.pid_exists(pid), "it is killed")
    finally:
        launcher.close()


def _asked_again(launcher: Launcher) -> bool:
    """Signals that follow at once are one request; so it is asked until it listens."""
    with suppress(ProcessLookupError):
        launcher.process.send_signal(signal.SIGTERM)
    return launcher.process.poll() is not None
