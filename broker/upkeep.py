"""The thread in which a worker process looks after its leases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic

from broker.errors import BrokerUnavailableError
from config.logs import get_logger

log = get_logger(__name__)

Action = Callable[[], object]


class Upkeep:
    """Runs `tick` every `every_s`, and actions as they come, one at a time; `last` at the end.

    Whatever they raise, the thread lives. That the broker is away is logged once per outage.
    """

    def __init__(self, tick: Action, *, every_s: float, last: Action, owner: str) -> None:
        self._tick = tick
        self._every_s = every_s
        self._last = last
        self._owner = owner
        #: A SimpleQueue, because a signal handler may put into it. None ends the thread.
        self._inbox: SimpleQueue[Action | None] = SimpleQueue()
        self._alarm: tuple[float, Action] | None = None
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        """The first tick comes at once."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after what was put in before. Idempotent."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=timeout_s)

    def do(self, action: Action) -> None:
        """Have `action` run soon. May be called from a signal handler."""
        self._inbox.put(action)

    def do_at(self, when: float, action: Action) -> None:
        """Have `action` run at a monotonic time, once; a second alarm replaces the first."""
        self._alarm = (when, action)
        self._inbox.put(_look)

    def guarded(self, action: Action) -> bool:
        """Run `action` here; False when it failed, which is logged."""
        try:
            action()
        except BrokerUnavailableError as error:
            if self._reachable:
                self._reachable = False
                log.warning("broker_lost", owner=self._owner, error=str(error))
            return False
        except Exception:
            log.exception("lease_upkeep_failed", owner=self._owner)
            return False
        return True

    def _run(self) -> None:
        tick_at = monotonic()
        while True:
            wake_at = tick_at if self._alarm is None else min(tick_at, self._alarm[0])
            with suppress(Empty):
                action = self._inbox.get(timeout=max(0.0, wake_at - monotonic()))
                if action is None:
                    break
                self.guarded(action)
            if self._alarm is not None and monotonic() >= self._alarm[0]:
                _, action = self._alarm
                self._alarm = None
                self.guarded(action)
            if monotonic() >= tick_at:
                if self.guarded(self._tick) and not self._reachable:
                    self._reachable = True
                    log.info("broker_found", owner=self._owner)
                tick_at = monotonic() + self._every_s
        with suppress(Empty):
            while (action := self._inbox.get_nowait()) is not None:
                self.guarded(action)
        self.guarded(self._last)


def _look() -> None:
    """Wakes the thread for a new alarm."""
