"""One lease: a job this process may work on until the lease is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from broker.jobs import Claim
from config.logs import get_logger

log = get_logger(__name__)


class Lease:
    """What the job's thread and the registry's thread know of a running attempt."""

    __slots__ = (
        "_callbacks",
        "_lock",
        "cancelled",
        "claim",
        "lost",
        "renewed",
        "started",
        "taken",
        "thread",
    )

    def __init__(self, claim: Claim, *, now: float) -> None:
        self.claim = claim
        #: The job's thread has taken it up.
        self.started = False
        #: Another worker may have the job: stop; whatever is written now is refused.
        self.lost = threading.Event()
        #: The owner wants the job stopped: stop, then complete it as cancelled.
        self.cancelled = threading.Event()
        #: The thread that runs the job.
        self.thread: threading.Thread | None = None
        #: Monotonic times (s) of the claim and of the last renewal.
        self.taken = self.renewed = now
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def stopping(self) -> bool:
        return self.lost.is_set() or self.cancelled.is_set()

    @property
    def alive(self) -> bool:
        """Not yet started, or its thread still runs."""
        return self.thread is None or self.thread.is_alive()

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call back when the lease is lost or a cancel is wanted; at once if that is so already.

        Runs in the registry's thread and must return quickly; it may be called twice (a cancelled
        job whose lease is lost later).
        """
        with self._lock:
            self._callbacks.append(callback)
            late = self.stopping
        if late:
            callback()

    def stop(self, flag: threading.Event) -> None:
        """Set `lost` or `cancelled` and tell whoever listens; a second time does nothing."""
        with self._lock:
            if flag.is_set():
                return
            flag.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("stop_callback_failed", job_id=self.claim.job.id)
