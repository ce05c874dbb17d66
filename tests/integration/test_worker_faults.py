"""What happens to jobs when workers die, stand still or are told to go, and when Redis restarts."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.jobs import Status
from tests.conftest import PATIENCE_S, free_port
from tests.integration.worker_lab import QUEUE, Lab, Server, until

TTL_S = 2.0
#: What a busy machine may add; the sweep that would find lapsed leases comes every 30 s.
LATE_S = 15.0


@pytest.fixture
def lab(broker_url: str, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(broker_url, tmp_path, ttl_s=TTL_S, grace_s=2.0)
    yield lab
    lab.close()


@pytest.fixture
def valkey_lab(valkey: str, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(valkey, tmp_path, ttl_s=TTL_S, grace_s=2.0)
    yield lab
    lab.close()


@pytest.fixture
def server(valkey_binary: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(valkey_binary, free_port(), tmp_path)
    server.start()
    yield server
    server.stop()


def test_killed_worker_loses_no_job(lab: Lab) -> None:
    victim, _ = lab.start_many(2)
    ids = lab.put(50, sleep_s=0.2)
    until(lambda: str(victim.pid) in "".join(lab.starts()), "the victim works")
    victim.kill()
    assert lab.await_end(ids) < TTL_S + LATE_S
    lab.assert_completed_once(ids)
    again = [line for line in lab.starts() if line.split(":")[1] == "2"]
    assert 1 <= len(again) <= 4
    assert all(lab.job(job_id).attempt <= 2 for job_id in ids)


def test_job_longer_than_its_lease_runs_once(valkey_lab: Lab) -> None:
    lab = valkey_lab
    lab.start_many(2)
    ids = lab.put(4, sleep_s=2 * TTL_S)
    lab.await_end(ids)
    lab.assert_completed_once(ids)
    assert len(lab.starts()) == 4


def test_stopped_worker_is_refused_when_it_wakes(lab: Lab) -> None:
    sleeper = lab.start(concurrency=1)
    (job_id,) = lab.put(sleep_s=1.0)
    lab.await_start(job_id)
    sleeper.send_signal(signal.SIGSTOP)
    other = lab.start(concurrency=1)
    assert lab.await_start(job_id, attempt=2) == other.pid
    lab.await_end([job_id])
    sleeper.send_signal(signal.SIGCONT)
    # It completes (and is refused) or learns that its lease is lost, whichever comes first.
    until(
        lambda: lab.client.zcard("test:refused") or "lease_lost" in str(lab.log(0)),
        "the sleeper hears that it was too late",
    )
    lab.assert_completed_once([job_id])
    assert lab.job(job_id).attempt == 2
    other.kill()
    other.wait()
    lab.await_end(lab.put())  # the sleeper works on


def test_drain_finishes_what_runs_and_takes_nothing_more(lab: Lab) -> None:
    worker = lab.start(concurrency=2)
    ids = lab.put(6, sleep_s=0.5)
    until(lambda: len(lab.starts()) == 2, "two jobs run")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    assert len(lab.starts()) == 2
    statuses = sorted(lab.job(job_id).status for job_id in ids)
    assert statuses == [Status.COMPLETED] * 2 + [Status.QUEUED] * 4
    assert lab.queue.workers() == []
    stats = lab.queue.stats(QUEUE)
    assert (stats.depth, stats.in_flight) == (4, 0)


def test_drain_hands_back_what_outlives_the_grace(lab: Lab) -> None:
    worker = lab.start(concurrency=2)
    ids = lab.put(2, sleep_s=60)
    for job_id in ids:
        lab.await_start(job_id)
    begun = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    until(lambda: [w.state for w in lab.queue.workers()] == ["draining"], "heartbeat says so")
    assert worker.wait(PATIENCE_S) == 0
    assert 1.5 < time.monotonic() - begun < 30  # of the 60 that its jobs would take
    assert [lab.job(job_id).status for job_id in ids] == [Status.QUEUED] * 2
    assert [lab.job(job_id).attempt for job_id in ids] == [1, 1]
    assert lab.queue.workers() == []
    lab.start()
    for job_id in ids:
        lab.await_start(job_id, attempt=2)


def test_workers_are_replaced_one_after_another_under_load(valkey_lab: Lab) -> None:
    """A rolling upgrade: nothing is lost, run twice, or held up by more than a drain."""
    lab = valkey_lab
    workers = lab.start_many(2, concurrency=2)
    ids = lab.put(8, sleep_s=0.2)
    for old in workers:
        ids += lab.put(8, sleep_s=0.2)
        until(lambda old=old: str(old.pid) in "".join(lab.starts()), "it works")
        new = lab.start(concurrency=2)
        ids += lab.put(8, sleep_s=0.2)
        old.send_signal(signal.SIGTERM)
        assert old.wait(PATIENCE_S) == 0
        until(lambda new=new: str(new.pid) in "".join(lab.starts()), "its successor works")
    last = lab.put(sleep_s=0.0)
    lab.await_end(ids + last)
    lab.assert_completed_once(ids + last)
    # The drain was longer than any job: none was handed back or begun twice.
    assert len(lab.starts()) == len(ids + last)
    waits_ms = [lab.job(x).started_ms - lab.job(x).created_ms for x in ids]  # type: ignore[operator]
    assert max(waits_ms) < 8_000


def test_second_signal_hands_running_jobs_back(valkey_lab: Lab) -> None:
    lab = valkey_lab
    worker = lab.start(concurrency=1, FOREBAY_WORKER__GRACE_S="60")
    (job_id,) = lab.put(sleep_s=60)
    lab.await_start(job_id)
    worker.send_signal(signal.SIGQUIT)
    worker.wait(PATIENCE_S)
    job = lab.job(job_id)
    assert (job.status, job.attempt) == (Status.QUEUED, 1)


@pytest.mark.parametrize("outage_s", [0.0, 1.0])
def test_redis_restart_is_survived(server: Server, tmp_path: Path, outage_s: float) -> None:
    lab = Lab(server.url, tmp_path, ttl_s=5.0)
    try:
        lab.start(concurrency=4)
        ids = lab.put(40, sleep_s=0.2)
        until(lambda: len(lab.starts()) >= 8, "jobs run")
        server.stop()
        time.sleep(outage_s)  # how long Redis is away is what the test is about
        server.start()
        lab.await_end(ids)
        lab.assert_completed_once(ids)
        assert len(lab.starts()) == len(set(lab.starts()))
        assert max(lab.job(job_id).attempt for job_id in ids) == 1
        events = [line["event"] for line in lab.log()]
        assert events.count("broker_lost") <= 1
        assert events.count("broker_unreachable") <= 1
        assert lab.workers[0].poll() is None
    finally:
        lab.close()


def test_forgotten_scripts_are_loaded_again(valkey_lab: Lab) -> None:
    lab = valkey_lab
    lab.start()
    lab.await_end(lab.put(4))
    lab.client.script_flush()
    lab.await_end(lab.put(4))
    assert lab.workers[0].poll() is None


def test_refusals_by_redis_are_waited_out(valkey_lab: Lab) -> None:
    """Redis without memory to spare refuses the bell; claims go on, the worker lives."""
    lab = valkey_lab
    lab.start()
    lab.await_end(lab.put(4))
    try:
        lab.client.config_set("maxmemory", "1")
        until(lambda: lab.client.info("stats")["total_error_replies"] > 0, "a refusal")
    finally:
        lab.client.config_set("maxmemory", "0")
    lab.await_end(lab.put(4))
    assert lab.workers[0].poll() is None
