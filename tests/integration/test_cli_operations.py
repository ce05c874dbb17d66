"""The commands of operators against a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from api.cli import main
from broker.connections import connect
from broker.errors import QueueDrainingError
from broker.jobs import NewJob, Outcome, Status, Usage
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from config.settings import Queue
from config.settings import Redis as RedisSettings
from tests.apiserver import CHAT, ready_worker

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def queue(valkey: str) -> Iterator[RedisQueue]:
    with connect(RedisSettings(url=valkey)) as client:
        yield RedisQueue(client, Queue())


@pytest.fixture
def forebay(valkey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_REDIS__URL", valkey)
    monkeypatch.setenv("FOREBAY_DATABASE__URL", f"sqlite:///{tmp_path / 'a.db'}")

    def run(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, args)
        return result.exit_code, result.output

    return run


def _job() -> NewJob:
    return NewJob(tenant="ten_a", model=CHAT, endpoint="/v1/chat/completions", body=b"{}")


def _listed(forebay: Run) -> dict[str, Any]:
    code, said = forebay("queues", "--json")
    assert code == 0
    found: dict[str, Any] = {entry["queue"]: entry for entry in json.loads(said)}[CHAT]
    return found


def test_a_queue_is_paused_drained_and_resumed(forebay: Run, queue: RedisQueue) -> None:
    queue.enqueue(_job())
    assert forebay("queues", "pause", CHAT) == (0, f"{CHAT}: paused, 1 waiting, 0 running\n")
    assert queue.claim(CHAT, "w") == []
    assert _listed(forebay)["mode"] == "paused"
    assert "paused" in forebay("queues")[1]
    assert json.loads(forebay("queues", "drain", CHAT, "--json")[1]) == {
        "queue": CHAT,
        "mode": "draining",
    }
    with pytest.raises(QueueDrainingError):
        queue.enqueue(_job())
    assert forebay("queues", "resume", CHAT) == (0, f"{CHAT}: running, 1 waiting, 0 running\n")
    assert len(queue.claim(CHAT, "w")) == 1
    code, said = forebay("queues", "pause", "nothing")
    assert (code, "no queue 'nothing'" in said) == (2, True)


def test_queues_tell_their_drain_rates(forebay: Run, queue: RedisQueue) -> None:
    for _ in range(3):
        queue.enqueue(_job())
    # A rate needs a time to be one of: within a millisecond there is none.
    time.sleep(0.01)
    for _ in range(2):
        (claim,) = queue.claim(CHAT, "w")
        queue.complete(
            claim,
            Outcome(status=Status.COMPLETED, output=b"{}", usage=Usage(output_tokens=9)),
        )
    found = _listed(forebay)
    assert found["depth"] == 1
    assert 0 < found["jobs_per_s"] < found["tokens_per_s"]
    (tenant,) = found["top_tenants"]
    assert (tenant["tenant"], tenant["queued"]) == ("ten_a", 1)
    assert tenant["jobs_per_s"] > 0
    assert "Jobs/s" in forebay("queues")[1]


def test_workers_tell_their_leases(forebay: Run, queue: RedisQueue) -> None:
    assert forebay("workers") == (0, "no workers\n")
    status: WorkerStatus = ready_worker(CHAT)
    queue.heartbeat(status, ttl_s=10)
    queue.enqueue(_job())
    queue.enqueue(_job())
    (mine,) = queue.claim(CHAT, status.owner)
    (other,) = queue.claim(CHAT, "gone")
    (worker,) = json.loads(forebay("workers", "--json")[1])
    assert worker["owner"] == status.owner
    (lease,) = worker["leases"]
    assert (lease["job_id"], lease["attempt"]) == (mine.job.id, 1)
    assert lease["started_ms"] <= lease["renewed_ms"] + 1 < lease["expires_ms"]
    plain = forebay("workers")[1]
    assert "Renewed" in plain
    assert mine.job.id not in plain
    listed = forebay("workers", "--leases")[1]
    assert mine.job.id in listed
    assert other.job.id in listed
