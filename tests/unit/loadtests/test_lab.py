"""Servers of a benchmark start where they are put and end with it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
import redis

from loadtests.harness import BenchError
from loadtests.lab import Child, Lab, clean_environment, run, until

ECHO_CORE = "import json, os; print(json.dumps({'cores': sorted(os.sched_getaffinity(0))}))"
STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('{}', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def _restore_sigterm() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def gone(child: Child) -> bool:
    return child.process.returncode is not None


def test_a_child_runs_on_its_core() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    with Lab() as lab:
        child = lab.start([sys.executable, "-c", ECHO_CORE], name="echo", core=1, piped=True)
        assert child.read_json() == {"cores": [allowed[1 % len(allowed)]]}


def test_everything_ends_when_the_benchmark_fails() -> None:
    started: list[Any] = []

    def fail() -> None:
        with Lab() as lab:
            started.append(lab.redis())
            started.append(lab.start([sys.executable, "-c", "input()"], name="a", piped=True))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    url, child = started
    assert gone(child)
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.lab.STOP_GRACE_S", 0.1)
    with Lab() as lab:
        child = lab.start([sys.executable, "-c", STUBBORN], name="stubborn", piped=True)
        child.read_json()
    assert child.process.returncode == -signal.SIGKILL


def test_a_paused_child_still_ends() -> None:
    with Lab() as lab:
        child = lab.start([sys.executable, "-c", "input()"], name="paused", piped=True)
        child.pause()
    assert gone(child)


def test_waiting_on_a_dead_server_shows_its_last_words() -> None:
    with Lab() as lab:
        child = lab.start([sys.executable, "-c", "raise SystemExit('no such port')"], name="dead")
        with pytest.raises(BenchError, match="no such port"):
            until(lambda: False, what="a miracle", child=child)


def test_waiting_has_an_end() -> None:
    with pytest.raises(BenchError, match=r"waited 0\.01 s for a miracle"):
        until(lambda: False, what="a miracle", timeout_s=0.01, every_s=0.001)


def test_children_see_no_settings_and_may_cache_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_LOG__LEVEL", "debug")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("KEPT", "1")
    shown = clean_environment()
    assert shown["KEPT"] == "1"
    assert not {"FOREBAY_LOG__LEVEL", "PYTHONDONTWRITEBYTECODE"} & set(shown)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (BenchError("why"), 2)])
def test_an_explained_end_is_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        raise error

    monkeypatch.setattr("loadtests.lab.logs.configure", lambda *_, **__: None)
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status


def test_cpu_time_of_a_child_is_its_own() -> None:
    with Lab() as lab:
        busy = "sum(range(3_000_000)); print('{}', flush=True); input()"
        child = lab.start([sys.executable, "-c", busy], name="busy", piped=True)
        child.read_json()
        assert 0 < child.cpu_s() < 30
