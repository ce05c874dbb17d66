"""A lease (a job this process may work on until the lease is lost), and the table of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from broker.jobs import Band, Claim
from config.logs import get_logger

log = get_logger(__name__)


class Lease:
    """What the job's thread and the registry's thread know of a running attempt."""

    __slots__ = (
        "_callbacks",
        "_lock",
        "cancelled",
        "claim",
        "handed_back",
        "lost",
        "renewed",
        "started",
        "taken",
        "thread",
    )

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        #: The job's thread has taken it up.
        self.started = False
        #: Another worker may have the job: stop; whatever is written now is refused.
        self.lost = threading.Event()
        #: It is lost because the registry gave the job back to the queue; set before `lost`.
        self.handed_back = False
        #: The owner wants the job stopped: stop, then complete it as cancelled.
        self.cancelled = threading.Event()
        #: The thread that runs the job.
        self.thread: threading.Thread | None = None
        #: Monotonic times (s) of the claim and of the last renewal.
        self.taken = self.renewed = monotonic()
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

        Runs in the upkeep's thread and must return quickly; it may be called twice (a cancelled
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


class LeaseTable:
    """The leases of a process by job id. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, claim: Claim) -> bool:
        """False when the process still has an earlier attempt of the job."""
        with self._lock:
            if claim.job.id in self._leases:
                return False
            self._leases[claim.job.id] = Lease(claim)
            return True

    def find(self, job_id: str) -> Lease | None:
        return self._leases.get(job_id)

    def start(self, job_id: str) -> Lease:
        """The calling thread takes the job up. Raises `KeyError` when there is none to take."""
        with self._lock:
            lease = self._leases[job_id]
            if lease.started:
                raise KeyError(job_id)
            lease.thread = threading.current_thread()
            lease.started = True
            return lease

    def remove(self, lease: Lease, *, unless_started: bool = False) -> bool:
        """False when it isn't there (any more), or was started in the meantime."""
        with self._lock:
            if self._leases.get(lease.claim.job.id) is not lease:
                return False
            if unless_started and lease.started:
                return False
            del self._leases[lease.claim.job.id]
            return True

    def take(self, tag: str) -> Lease | None:
        """Remove and return the lease a delivery tag `<job id>:<attempt>` names."""
        job_id, _, attempt = tag.rpartition(":")
        with self._lock:
            lease = self._leases.get(job_id)
            if lease is None or str(lease.claim.attempt) != attempt:
                return None
            return self._leases.pop(job_id)

    def count(self, band: Band) -> int:
        with self._lock:
            return sum(lease.claim.job.band is band for lease in self._leases.values())

    def all(self) -> list[Lease]:
        with self._lock:
            return list(self._leases.values())
