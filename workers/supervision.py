"""Notices an engine that died or stands still, and keeps its suspects apart. Free of torch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from config.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """What a watchdog sees of an engine's loop."""

    #: The loop's thread runs and takes requests.
    alive: bool
    #: Requests inside.
    running: int
    #: Steps done since start.
    steps: int


class Watchdog:
    """Looks at an engine's loop in an own thread and says when it is dead.

    `on_dead` gets the reason (`died` or `stalled`) and is called from the watchdog's thread; the
    next look is taken after it returned.
    """

    def __init__(
        self,
        pulse: Callable[[], Pulse],
        on_dead: Callable[[str], None],
        *,
        stall_s: float,
        interval_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pulse = pulse
        self._on_dead = on_dead
        self._stall_s = stall_s
        self._interval_s = interval_s
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine-watchdog", daemon=True)
        self._steps = -1
        self._since = clock()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self) -> str | None:
        """One look: `died`, `stalled`, or None when all is well."""
        pulse, now = self._pulse(), self._clock()
        if pulse.steps != self._steps or pulse.running == 0:
            self._steps, self._since = pulse.steps, now
        if not pulse.alive:
            return "died"
        if now - self._since > self._stall_s:
            return "stalled"
        return None

    def _loop(self) -> None:
        while not self._stopping.wait(self._interval_s):
            reason = self.look()
            if reason is not None and not self._stopping.is_set():
                try:
                    self._on_dead(reason)
                except Exception:
                    log.exception("engine_rebuild_failed")
                self._since = self._clock()


class SoloGate:
    """Lets jobs run together, except those that were inside when the engine died: they run alone.

    One of them may be what kills the engine; alone it can take nobody with it again. Turns are
    given in order of arrival, so neither kind starves the other.
    """

    #: Suspects remembered; the oldest are forgotten first.
    _MOST = 10_000

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._suspects: dict[str, None] = {}
        self._queue: deque[object] = deque()
        self._inside = 0
        self._alone = False

    def suspect(self, job_id: str) -> None:
        """From now on this job runs alone."""
        with self._changed:
            self._suspects[job_id] = None
            if len(self._suspects) > self._MOST:
                del self._suspects[next(iter(self._suspects))]

    @contextmanager
    def enter(self, job_id: str) -> Iterator[None]:
        """Wait for the turn, and hold it."""
        with self._changed:
            alone = job_id in self._suspects
            if alone or self._alone or self._queue:
                self._await_turn(alone)
            self._alone = alone
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if alone:
                    self._alone = False
                    self._suspects.pop(job_id, None)
                self._changed.notify_all()

    def _await_turn(self, alone: bool) -> None:
        ticket = object()
        self._queue.append(ticket)

        def my_turn() -> bool:
            return self._queue[0] is ticket and not (self._inside if alone else self._alone)

        try:
            self._changed.wait_for(my_turn)
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()
