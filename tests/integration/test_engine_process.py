"""`python -m workers` as a real process: ready, jobs, metrics, a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from broker.connections import connect
from broker.jobs import EventType, NewJob, Status
from broker.redis_queue import RedisQueue
from config.settings import Settings
from tests.conftest import PATIENCE_S, free_port

MODEL = "smollm2-135m"


def _until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not condition():
        assert process.poll() is None, "the worker ended"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def queue(valkey: str) -> RedisQueue:
    settings = Settings(redis={"url": valkey})
    return RedisQueue(connect(settings.redis), settings.queue)


@pytest.fixture
def metrics_port() -> int:
    return free_port()


@pytest.fixture
def worker(
    valkey: str, queue: RedisQueue, metrics_port: int, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """A worker with the simulated engine, ready."""
    env = {name: value for name, value in os.environ.items() if "FOREBAY" not in name}
    env |= {
        "FOREBAY_REDIS__URL": valkey,
        "FOREBAY_WORKER__ENGINE": "simulated",
        "FOREBAY_WORKER__METRICS_PORT": str(metrics_port),
        "FOREBAY_WORKER__GRACE_S": "1",
        "FOREBAY_SIMULATED__STEP_MS": "2",
        "FOREBAY_LOG__FORMAT": "json",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "workers", "--model", MODEL, "--name", "one"]
    log = tmp_path / "worker.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=stderr, text=True)
    try:
        _until(lambda: any(each.state == "ready" for each in queue.workers()), process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        sys.stderr.write(log.read_text())


def _submit(queue: RedisQueue, **changes: object) -> str:
    body = {"messages": [{"role": "user", "content": "private words"}], "max_tokens": 8}
    job = NewJob(
        tenant="acme",
        model=MODEL,
        endpoint="/v1/chat/completions",
        body=orjson.dumps(body | changes),
        stream=True,
    )
    queue.enqueue(job)
    return job.id


def test_a_worker_from_ready_to_gone(
    worker: subprocess.Popen[str], queue: RedisQueue, metrics_port: int, tmp_path: Path
) -> None:
    status = queue.workers()[0]
    assert (status.queue, status.engine, status.capacity) == (MODEL, "simulated", 64)

    jobs = [_submit(queue) for _ in range(20)]
    _until(lambda: all(queue.get(job).is_terminal for job in jobs), worker)
    for job_id in jobs:
        job = queue.get(job_id)
        assert job.status is Status.COMPLETED
        assert job.output is not None
        output = orjson.loads(job.output)
        assert output["system_fingerprint"] == "simulated"
        events, complete = queue.events(job_id)
        assert complete
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert events[-1].type is EventType.COMPLETED
        text = "".join(event.text for event in events)
        assert text == output["choices"][0]["message"]["content"]

    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as answer:
        metrics = answer.read().decode()
    assert (
        f'forebay_workers_tokens_total{{engine="simulated",kind="output",model="{MODEL}"}} 160.0'
        in metrics
    )

    long = _submit(queue, max_tokens=1000)
    _until(lambda: bool(queue.text(long)), worker)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    # Given back, for the next worker.
    assert queue.get(long).status is Status.QUEUED
    assert queue.workers() == []

    log = (tmp_path / "worker.log").read_text()
    assert "private words" not in log
    lines = [orjson.loads(line) for line in log.splitlines() if line.startswith("{")]
    finished = [line for line in lines if line["event"] == "job_finished"]
    assert {line["job_id"] for line in finished} == {*jobs, long}
    assert {line["status"] for line in finished} == {"completed", "requeued"}


def test_a_cancelled_job_is_stopped(worker: subprocess.Popen[str], queue: RedisQueue) -> None:
    job_id = _submit(queue, max_tokens=1000)
    _until(lambda: bool(queue.text(job_id)), worker)
    assert queue.cancel(job_id) == "cancelling"
    _until(lambda: queue.get(job_id).is_terminal, worker)
    job = queue.get(job_id)
    assert job.status is Status.CANCELLED
    assert 0 < job.usage.output_tokens < 1000
