"""Tells which workers of this machine no longer work, from what they last said of themselves."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from broker.queue import JobQueue
from broker.stats import WorkerStatus


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A worker that is to be taken out."""

    pid: int
    #: `stalled`: it has jobs and its step counter stands still; `silent`: it says nothing.
    reason: Literal["stalled", "silent"]
    jobs: int


class Judge:
    """Remembers what each worker said, and when it last got on.

    A worker looks after its own engine too, and ends itself when that can't be rebuilt; `stall_s`
    is meant to be longer than its own patience. `silent_s` is counted from when its last word ran
    out, which is when its jobs went to other workers.
    """

    def __init__(
        self, *, stall_s: float, silent_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stall_s = stall_s
        self._silent_s = silent_s
        self._clock = clock
        #: By pid: owner, steps, and since when they stand there.
        self._known: dict[int, tuple[str, int, float]] = {}
        self._silent: dict[int, float] = {}

    def look(self, workers: Sequence[WorkerStatus], pids: Collection[int]) -> list[Verdict]:
        """One look at the workers whose processes are ours; each verdict is given once."""
        now, here = self._clock(), socket.gethostname()
        heard = {each.pid: each for each in workers if each.hostname == here and each.pid in pids}
        for pid in [pid for pid in self._known if pid not in pids]:
            self._forget(pid)
        verdicts: list[Verdict] = []
        for pid, status in heard.items():
            owner, steps, since = self._known.get(pid, ("", -1, now))
            back = self._silent.pop(pid, None) is not None
            idle = status.jobs <= status.waiting
            if back or owner != status.owner or steps != status.steps or idle:
                since = now
            self._known[pid] = (status.owner, status.steps, since)
            if status.state in ("ready", "draining") and now - since > self._stall_s:
                verdicts.append(Verdict(pid=pid, reason="stalled", jobs=status.jobs))
        for pid in self._known.keys() - heard.keys():
            if now - self._silent.setdefault(pid, now) > self._silent_s:
                verdicts.append(Verdict(pid=pid, reason="silent", jobs=0))
        for verdict in verdicts:
            self._forget(verdict.pid)
        return verdicts

    def excuse(self) -> None:
        """Nobody could be heard, for no fault of theirs: all begin anew."""
        self._known.clear()
        self._silent.clear()

    def _forget(self, pid: int) -> None:
        self._known.pop(pid, None)
        self._silent.pop(pid, None)


def release_process(queue: JobQueue, pid: int) -> int:
    """Give back the jobs of a process of this machine that is gone, and forget it; their number."""
    released = 0
    for worker in queue.workers():
        if worker.pid == pid and worker.hostname == socket.gethostname():
            released += queue.release_owner(worker.queue, worker.owner)
            queue.forget_worker(worker.owner)
    return released
