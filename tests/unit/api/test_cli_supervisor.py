"""Children that crash, hang, write and outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from api.cli.backoff import Backoff
from api.cli.merged_log import LineSplitter, MergedLog
from api.cli.supervisor import Spec, StartFailedError, Supervisor, describe
from tests.conftest import PATIENCE_S


class Lines(MergedLog):
    """Keeps what would be written."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def say(self, name: str, line: str | bytes) -> None:
        self.lines.append((name, line.decode() if isinstance(line, bytes) else line))
        self._changed.set()

    def close(self, timeout_s: float = 1.0) -> None:
        return None

    async def until(self, found: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not found():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def log() -> Lines:
    return Lines()


@pytest.fixture
async def supervisor(log: Lines) -> AsyncIterator[Supervisor]:
    made = Supervisor(log, tries=3)
    yield made
    made.kill()
    await made.stop(list(made.children), deadline=time.monotonic() + 5)


def spec(code: str, name: str = "child", **more: object) -> Spec:
    return Spec(name=name, argv=[sys.executable, "-c", code], env={}, **more)  # type: ignore[arg-type]


def quick() -> Backoff:
    return Backoff(first_s=0.01, longest_s=0.05)


# -- backoff --------------------------------------------------------------------------------------
def test_pauses_grow_to_a_bound_with_jitter() -> None:
    backoff = Backoff(first_s=1, factor=2, longest_s=5, chance=lambda: 1.0)
    assert [backoff.after(0) for _ in range(5)] == [1, 2, 4, 5, 5]
    backoff = Backoff(first_s=1, factor=2, longest_s=5, chance=lambda: 0.0)
    assert [backoff.after(0) for _ in range(3)] == [0.5, 1, 2]


def test_a_stable_run_starts_over() -> None:
    backoff = Backoff(first_s=1, stable_s=30, chance=lambda: 1.0)
    for _ in range(4):
        backoff.after(0.1)
    assert backoff.after(31) == 1
    assert backoff.failures == 1


# -- supervisor -----------------------------------------------------------------------------------
async def test_lines_carry_the_name_and_stdout_is_not_ours(
    supervisor: Supervisor, log: Lines
) -> None:
    supervisor.start(spec("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"))
    await log.until(lambda: {("child", "out"), ("child", "err")} <= set(log.lines))


async def test_a_killed_child_comes_back(supervisor: Supervisor, log: Lines) -> None:
    gone: list[int] = []
    child = supervisor.start(
        spec("import time; print('up', flush=True); time.sleep(60)", on_exit=gone.append), quick()
    )
    supervisor.ready = True
    await log.until(lambda: ("child", "up") in log.lines)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await log.until(lambda: log.lines.count(("child", "up")) == 2)
    assert child.pid not in (None, first)
    assert gone == [first]
    assert any("was ended by SIGKILL" in line for _, line in log.lines)


async def test_before_ready_it_gives_up_after_some_tries(
    supervisor: Supervisor, log: Lines
) -> None:
    child = supervisor.start(spec("raise SystemExit(7)"), quick())
    with pytest.raises(StartFailedError, match=r"^child exited with status 7 3 times$"):
        await asyncio.wait_for(supervisor.failure(), 20)
    assert child.starts == 3


async def test_a_misconfigured_child_is_not_tried_again(supervisor: Supervisor) -> None:
    child = supervisor.start(spec("raise SystemExit(2)"), quick())
    with pytest.raises(StartFailedError, match="status 2"):
        await asyncio.wait_for(supervisor.failure(), 20)
    assert child.starts == 1


async def test_a_program_that_is_missing_is_a_failure(supervisor: Supervisor) -> None:
    supervisor.start(Spec(name="x", argv=["/nonexistent/program"], env={}), quick())
    with pytest.raises(StartFailedError, match="x exited with status 127"):
        await asyncio.wait_for(supervisor.failure(), 20)


async def test_stop_asks_first_and_kills_late_ones(supervisor: Supervisor, log: Lines) -> None:
    polite = supervisor.start(
        spec("import time; print('up', flush=True); time.sleep(60)", name="polite")
    )
    deaf = supervisor.start(
        spec(
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('up', flush=True); time.sleep(60)",
            name="deaf",
        )
    )
    await log.until(lambda: {("polite", "up"), ("deaf", "up")} <= set(log.lines))
    began = time.monotonic()
    await supervisor.stop(["polite", "deaf"], deadline=began + 1)
    assert time.monotonic() - began < 30
    assert polite.pid is None
    assert deaf.pid is None
    assert ("up", "deaf did not end in time and is killed") in log.lines
    assert not any("polite did not" in line for _, line in log.lines)


async def test_stop_does_not_wait_for_a_pause_between_runs(
    supervisor: Supervisor, log: Lines
) -> None:
    supervisor.ready = True
    supervisor.start(spec("raise SystemExit(1)"), Backoff(first_s=60))
    await log.until(lambda: any("exited with status 1" in line for _, line in log.lines))
    began = time.monotonic()
    await supervisor.stop(["child"], deadline=began + 60)
    assert time.monotonic() - began < 30


async def test_grandchildren_go_with_the_child(supervisor: Supervisor, log: Lines) -> None:
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    child = supervisor.start(spec(code))
    supervisor.ready = True
    await log.until(lambda: any(name == "child" for name, _ in log.lines))
    grandchild = psutil.Process(int(next(line for name, line in log.lines if name == "child")))
    assert child.pid is not None
    await supervisor.stop(["child"], deadline=time.monotonic() + PATIENCE_S)
    _, alive = psutil.wait_procs([grandchild], timeout=PATIENCE_S)
    assert not alive or alive[0].status() == psutil.STATUS_ZOMBIE


def test_how_a_process_ended() -> None:
    assert describe(3) == "exited with status 3"
    assert describe(-9) == "was ended by SIGKILL"
    assert describe(-250) == "was ended by signal 250"


# -- merged log -----------------------------------------------------------------------------------
def test_lines_are_whole_and_named() -> None:
    reader, writer = os.pipe()
    log = MergedLog(writer, colour=False)
    log.say("api", "one")
    log.say("worker", b"two")
    log.say("api", "three")
    log.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"api | one\nworker | two\napi    | three\n"


def test_a_reader_that_stands_still_blocks_nobody() -> None:
    reader, writer = os.pipe()
    log = MergedLog(writer, colour=True)
    began = time.monotonic()
    for _ in range(12_000):
        log.say("api", "x" * 100)
    log.close(0.1)
    assert time.monotonic() - began < 5
    os.close(reader)


def test_bytes_become_lines() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"one\r\ntw") == [b"one"]
    assert splitter.feed(b"o\n\nthree") == [b"two", b""]
    assert splitter.end() == [b"three"]
    assert splitter.end() == []
    assert splitter.feed(b"x" * 70_000) == [b"x" * 70_000]
