"""Children of `forebay up` and `forebay workers start`: in own sessions, restarted, ended.

A child is told to die by the kernel when its parent itself is killed (PR_SET_PDEATHSIG), so that
nothing is left behind whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from api.cli.backoff import Backoff
from api.cli.merged_log import LineSplitter, MergedLog

_PR_SET_PDEATHSIG = 1
#: Loaded before any fork: nothing may be imported between fork and exec.
_LIBC = ctypes.CDLL(None, use_errno=True)
#: Exit status of a process whose settings or arguments can't be used; trying again won't help.
_MISCONFIGURED = 2
#: Ends in a row from which a child counts as looping.
_LOOPING = 3


class StartFailedError(Exception):
    """A child did not come up; the message says which and how it ended."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How one child is run."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    #: Descriptors the child inherits.
    pass_fds: tuple[int, ...] = ()
    #: What the kernel sends the child when `forebay up` is gone.
    death_signal: int = signal.SIGKILL
    #: Called in a thread with the pid of each run that ended on its own.
    on_exit: Callable[[int], None] | None = None


@dataclass
class Child:
    """One child and its latest run."""

    spec: Spec
    backoff: Backoff = field(default_factory=Backoff)
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    #: When the latest run began (`time.monotonic`).
    began: float = 0.0
    task: asyncio.Task[None] | None = None
    stop_wanted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def stopping(self) -> bool:
        return self.stop_wanted.is_set()

    @property
    def looping(self) -> bool:
        """It ends soon after each start, again and again."""
        ran_s = time.monotonic() - self.began
        return self.backoff.failures >= _LOOPING and (
            self.pid is None or ran_s < self.backoff.stable_s
        )

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None


class Supervisor:
    """Runs children until told otherwise. All methods belong to one event loop's thread.

    The kernel's death signal is bound to the thread that forks: call from the main thread.
    """

    def __init__(self, log: MergedLog, *, tries: int = 5, who: str = "up") -> None:
        self._log = log
        self._who = who
        self._tries = tries
        self.children: dict[str, Child] = {}
        #: Set once the stack is ready: from then on a child is restarted for ever.
        self.ready = False
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def start(self, spec: Spec, backoff: Backoff | None = None) -> Child:
        child = Child(spec, backoff or Backoff())
        self.children[spec.name] = child
        child.task = asyncio.create_task(self._keep(child), name=f"child-{spec.name}")
        return child

    async def failure(self) -> None:
        """Wait until a child can't be started; raises `StartFailedError`."""
        raise StartFailedError(await asyncio.shield(self._failed))

    async def stop(
        self, names: Sequence[str], *, deadline: float, sig: int = signal.SIGTERM
    ) -> None:
        """Ask children to end, wait until `deadline` (`time.monotonic`), then kill them."""
        children = [self.children[name] for name in names if name in self.children]
        for child in children:
            child.stop_wanted.set()
            _signal(child, sig)
        tasks = [child.task for child in children if child.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.monotonic()))
        for child in children:
            if child.task in late:
                self._log.say(self._who, f"{child.spec.name} did not end in time and is killed")
                _signal(child, signal.SIGKILL)
        if late:
            await asyncio.wait(late, timeout=3)

    def running(self) -> dict[int, str]:
        """Names of the children that run, by pid."""
        return {child.pid: name for name, child in self.children.items() if child.pid is not None}

    def forget(self, name: str) -> None:
        """Drop a child that was stopped."""
        self.children.pop(name, None)

    def take_out(self, name: str) -> None:
        """Kill one run of a child that still shall run; it is started again after its pause."""
        if (child := self.children.get(name)) is not None:
            _signal(child, signal.SIGKILL)

    def kill(self) -> None:
        """End every child at once."""
        for child in self.children.values():
            child.stop_wanted.set()
            _signal(child, signal.SIGKILL)

    async def _keep(self, child: Child) -> None:
        name = child.spec.name
        while not child.stopping:
            started = time.monotonic()
            pid, status = await self._run(child)
            if child.stopping:
                return
            ran_s = time.monotonic() - started
            pause_s = child.backoff.after(ran_s)
            self._log.say(self._who, f"{name} (pid {pid}) {describe(status)} after {ran_s:.1f} s")
            if not self.ready and (
                status == _MISCONFIGURED or child.backoff.failures >= self._tries
            ):
                if not self._failed.done():
                    times = f"{child.backoff.failures} times" if child.backoff.failures > 1 else ""
                    self._failed.set_result(f"{name} {describe(status)} {times}".strip())
                return
            if child.spec.on_exit is not None and pid:
                await self._after_exit(child.spec.on_exit, pid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.stop_wanted.wait(), pause_s)

    async def _after_exit(self, on_exit: Callable[[int], None], pid: int) -> None:
        try:
            await asyncio.to_thread(on_exit, pid)
        except Exception as error:
            # Tidying up after a crash may fail (Redis may be what crashed); leases expire anyway.
            self._log.say(self._who, f"tidying up after pid {pid} failed: {type(error).__name__}")

    async def _run(self, child: Child) -> tuple[int, int]:
        """One run: (pid, exit status; negative is the signal)."""
        spec = child.spec
        # A pipe of our own: asyncio's would keep `wait` waiting for grandchildren that hold it.
        reader, writer = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                env=dict(spec.env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                pass_fds=spec.pass_fds,
                start_new_session=True,
                preexec_fn=die_with_parent(spec.death_signal),
            )
        except OSError as error:
            os.close(reader)
            self._log.say(self._who, f"{spec.name} can't be run: {error.strerror or error}")
            return 0, 127
        finally:
            os.close(writer)
        child.process = process
        child.starts += 1
        child.began = time.monotonic()
        if child.stopping:
            _signal(child, signal.SIGTERM)
        self._log.say(self._who, f"{spec.name} started (pid {process.pid})")
        with _Pump(reader, lambda line: self._log.say(spec.name, line)):
            try:
                status = await process.wait()
            finally:
                # What it started itself goes with its session.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.pid, status


class _Pump:
    """Hands on the lines that come through a pipe, until it is left; then what is in it already."""

    def __init__(self, reader: int, line: Callable[[bytes], None]) -> None:
        self._reader = reader
        self._line = line
        self._splitter = LineSplitter()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        os.set_blocking(self._reader, False)
        self._loop.add_reader(self._reader, self._read)

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._reader)
        while self._read():
            pass
        for line in self._splitter.end():
            self._line(line)
        os.close(self._reader)

    def _read(self) -> bool:
        """Whether more may be there at once."""
        try:
            chunk = os.read(self._reader, 65536)
        except BlockingIOError:
            return False
        if not chunk:
            # Nobody writes any more; the process may still run.
            self._loop.remove_reader(self._reader)
            return False
        for line in self._splitter.feed(chunk):
            # Some programs set themselves apart with blank lines; the prefix does that here.
            if line.strip():
                self._line(line)
        return True


def die_with_parent(death_signal: int) -> Callable[[], None]:
    """A `preexec_fn`: the kernel sends the child this signal when the forking thread is gone."""
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            # It was gone before the kernel knew.
            os._exit(1)

    return prepare


def describe(status: int) -> str:
    """`exited with status 3` or `was ended by SIGKILL`."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _signal(child: Child, sig: int) -> None:
    if child.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sig == signal.SIGKILL:
            os.killpg(child.pid, sig)
        else:
            os.kill(child.pid, sig)
