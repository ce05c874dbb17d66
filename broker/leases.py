"""The leases this process holds: kept alive, watched, settled and handed back.

One registry per worker process, with a thread of its own (`broker.upkeep`) that needs neither
Celery's event loop, which stands still during a drain, nor kombu's channels, which die at a
reconnect. A claim enters it before Celery hears of the job, and leaves it when the job's own thread
has settled it; Celery's acknowledgement only confirms what has already happened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.jobs import Band, Claim
from broker.lease import Lease, LeaseTable
from broker.queue import JobQueue
from broker.renewal import Renewal
from broker.stats import WorkerStatus
from broker.upkeep import Upkeep
from config.logs import get_logger

__all__ = ["Lease", "LeaseRegistry", "current", "install", "installed"]

log = get_logger(__name__)

#: A renewal also brings the news that a job was cancelled, in case `broker.cancels` missed it; so
#: it is done at least this often (s).
CANCEL_LATENCY_S = 1.0
#: Jobs that fell between two keys are looked for this often (s).
SWEEP_EVERY_S = 30.0
#: A job that is given back because something went wrong in this process rests this long (ms).
RETRY_DELAY_MS = 1_000


class LeaseRegistry:
    """All leases of one worker process.

    `status` and `healthy` are asked in the upkeep's thread (`healthy` also in Celery's) and must
    be cheap. `batch_slots` tells how many batch jobs it may hold at once (None: any number),
    `slots` how many jobs in all, where the transport doesn't see to that. While `healthy` is false
    nothing is claimed or renewed, so that other workers get the jobs once `ttl_s` is over.
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        queue_name: str,
        owner: str,
        ttl_s: float,
        renew_every_s: float,
        status: Callable[[], WorkerStatus],
        healthy: Callable[[], bool],
        grace_s: float = 8.0,
        batch_slots: Callable[[], int] | None = None,
        slots: Callable[[], int] | None = None,
    ) -> None:
        self.queue = queue
        self.queue_name = queue_name
        self.owner = owner
        self.ttl_s = ttl_s
        #: How long running jobs may go on after `drain` (s).
        self.grace_s = grace_s
        #: No new job is taken any more; whoever waits meanwhile waits for the event.
        self.draining = False
        self.drain_begun = threading.Event()
        #: Set once a drain has settled or handed back every job.
        self.drained = threading.Event()
        #: Called from the upkeep's thread when a drain begins, to wake a sleeping event loop.
        self.on_drain: Callable[[], object] | None = None
        self._status = status
        self._batch_slots = batch_slots
        self._slots = slots
        #: The transport waits for other work than batch jobs: it wants to hear when there is room.
        self._deaf = False
        self._healthy = healthy
        self._leases = LeaseTable()
        self._renewal = Renewal(
            queue, self._leases, queue_name=queue_name, owner=owner, ttl_s=ttl_s
        )
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        self._upkeep = Upkeep(
            self._tick,
            every_s=min(renew_every_s, CANCEL_LATENCY_S),
            last=self._leave,
            owner=owner,
        )

    # -- lifetime ---------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin the upkeep; the first heartbeat goes out at once."""
        self._upkeep.start()

    def stop(self) -> None:
        """Hand back whatever is left, forget the worker, end the thread. Idempotent."""
        self.draining = True
        self.drain_begun.set()
        self._upkeep.stop(self.ttl_s)

    def drain(self) -> None:
        """Take no more jobs, hand back what hasn't started, and what still runs after `grace_s`.

        Returns at once; may be called from a signal handler, and more than once.
        """
        if self.draining:
            return
        self.draining = True
        self._upkeep.do_at(time.monotonic() + self.grace_s, self._hand_back_all)
        self._upkeep.do(self._begin_drain)

    def announce(self) -> None:
        """Send a heartbeat now, because the worker's state has changed."""
        self._upkeep.do(self._beat)

    # -- claims -----------------------------------------------------------------------------------
    @property
    def held(self) -> int:
        """Jobs taken and not yet settled."""
        return len(self._leases)

    @property
    def accepting(self) -> bool:
        """More jobs may be claimed."""
        return not self.draining and self._is_healthy()

    @property
    def losses(self) -> int:
        """Leases lost since the start."""
        return self._renewal.losses

    def batch_room(self) -> int | None:
        """Batch jobs that may be claimed now; None: any number."""
        if self._batch_slots is None:
            return None
        most = self._batch_slots()
        room = most - self._leases.count(Band.BATCH)
        if self._slots is not None:
            slots = self._slots()
            if most >= slots:
                return None
            room = min(room, slots - self.held)
        return max(room, 0)

    def wait_for_room(self) -> bool:
        """Whether batch jobs have no room now; if so, the worker is woken when one has ended."""
        self._deaf = True
        if self.batch_room() == 0:
            return True
        self._deaf = False
        return False

    def add(self, claims: Iterable[Claim]) -> list[Claim]:
        """Register fresh claims; returns those to run, the others are handed back.

        Handed back is what comes in during a drain, and a job whose earlier attempt still winds
        down in this process.
        """
        taken: list[Claim] = []
        for claim in claims:
            if self.draining:
                self._give_back(claim)
            elif self._leases.add(claim):
                taken.append(claim)
            else:
                self._give_back(claim, delay_ms=RETRY_DELAY_MS)
        return taken

    def start_job(self, job_id: str) -> Lease:
        """The calling thread begins to work on the job.

        Raises `KeyError` when the job isn't (or no longer) this process's to run; then there is
        nothing to do and nothing to write.
        """
        if self.draining:
            raise KeyError(job_id)
        return self._leases.start(job_id)

    def settle(self, lease: Lease) -> None:
        """The job was completed, requeued or buried, or that was refused as stale."""
        self._leases.remove(lease)
        self._note_gone()

    def cancel(self, job_id: str) -> None:
        """Stop a job on an operator's word, as a cancel through the queue does."""
        if (lease := self._leases.find(job_id)) is not None:
            self._upkeep.do(partial(self._cancel, lease))

    def note_cancel(self, job_id: str) -> None:
        """Stop a job whose cancel the queue has told of, if it is one of ours."""
        if (lease := self._leases.find(job_id)) is not None:
            self._upkeep.do(partial(lease.stop, lease.cancelled))

    def hand_back(self, job_id: str) -> None:
        """Give a job up, a running one too, so that another worker runs it."""
        if (lease := self._leases.find(job_id)) is not None:
            self._upkeep.do(partial(self._hand_back, lease))

    def hand_back_unstarted(self) -> int:
        """Give back, now, every job that no thread has taken up; the attempt doesn't count."""
        leases = [x for x in self._leases.all() if self._leases.remove(x, unless_started=True)]
        for lease in leases:
            self.queue.requeue(lease.claim, refund=True)
        self._note_gone()
        return len(leases)

    # -- Celery's word ----------------------------------------------------------------------------
    def acknowledge(self, tag: str) -> None:
        """Celery is through with the message `<job id>:<attempt>`.

        A lease that is still there was settled by nobody. That is a bug in the task; the job goes
        back so that it isn't lost.
        """
        lease = self._leases.take(tag)
        self._note_gone()
        if lease is not None and not lease.lost.is_set():
            log.error("job_left_unsettled", job_id=lease.claim.job.id, attempt=lease.claim.attempt)
            self._give_back(lease.claim, delay_ms=RETRY_DELAY_MS, refund=False)

    def reject(self, tag: str, requeue: bool) -> None:
        """Celery won't run the message. The job goes back; with `requeue` at no cost to it."""
        lease = self._leases.take(tag)
        self._note_gone()
        if lease is None or lease.lost.is_set():
            return
        if requeue:
            self._give_back(lease.claim)
        else:
            log.error("job_rejected", job_id=lease.claim.job.id, attempt=lease.claim.attempt)
            self._give_back(lease.claim, delay_ms=RETRY_DELAY_MS, refund=False)

    def _give_back(self, claim: Claim, *, delay_ms: int = 0, refund: bool = True) -> None:
        """Requeue in the upkeep's thread. While the broker is away the lease runs out instead."""
        self._upkeep.do(partial(self.queue.requeue, claim, delay_ms=delay_ms, refund=refund))

    def _note_gone(self) -> None:
        """A job has left. A lost wake-up costs no more than the transport's next look."""
        if self._deaf and self.batch_room():
            self._deaf = False
            with suppress(BrokerUnavailableError):
                self.queue.wake(self.queue_name, self.owner)
        if self.draining and not self._leases:
            self.drained.set()

    # -- in the upkeep's thread -------------------------------------------------------------------
    def _tick(self) -> None:
        try:
            if self.draining:
                self.hand_back_unstarted()
            self._return_forgotten()
            if self._is_healthy():
                self._renewal.renew()
            self._beat()
            if time.monotonic() >= self._sweep_at:
                self._sweep_at = time.monotonic() + SWEEP_EVERY_S
                self.queue.sweep(self.queue_name)
        finally:
            self._renewal.give_up_overdue()

    def _return_forgotten(self) -> None:
        """Give back what was never started, or whose thread is gone: nobody will settle it."""
        now = time.monotonic()
        for lease in self._leases.all():
            if lease.alive and (lease.started or now - lease.taken < self.ttl_s):
                continue
            if self._leases.remove(lease, unless_started=lease.alive):
                log.error("job_forgotten", job_id=lease.claim.job.id, attempt=lease.claim.attempt)
                refund = not lease.started
                self.queue.requeue(lease.claim, delay_ms=RETRY_DELAY_MS, refund=refund)

    def _cancel(self, lease: Lease) -> None:
        lease.stop(lease.cancelled)
        with suppress(JobNotFoundError):
            self.queue.cancel(lease.claim.job.id)

    def _begin_drain(self) -> None:
        self.drain_begun.set()
        log.info("drain_started", owner=self.owner, jobs=self.held, grace_s=self.grace_s)
        if self.on_drain is not None:
            self.on_drain()
        self.hand_back_unstarted()
        self._beat()

    def _hand_back_all(self) -> None:
        for lease in self._leases.all():
            self._upkeep.guarded(partial(self._hand_back, lease))
        self.drained.set()

    def _leave(self) -> None:
        self._hand_back_all()
        self.queue.forget_worker(self.owner)

    def _hand_back(self, lease: Lease) -> None:
        if lease.lost.is_set() or self._leases.find(lease.claim.job.id) is not lease:
            return
        refund = self._leases.remove(lease, unless_started=True)
        log.info("job_handed_back", job_id=lease.claim.job.id, attempt=lease.claim.attempt)
        try:
            lease.handed_back = self.queue.requeue(lease.claim, refund=refund)
        finally:
            lease.stop(lease.lost)

    def _beat(self) -> None:
        status = self._status()
        now_ms = time.time_ns() // 1_000_000
        state = "draining" if self.draining else status.state
        self.queue.heartbeat(
            replace(status, state=state, jobs=self.held, seen_ms=now_ms), ttl_s=self.ttl_s
        )

    def _is_healthy(self) -> bool:
        try:
            return self._healthy()
        except Exception:
            log.exception("health_check_failed", owner=self.owner)
            return False


_current: LeaseRegistry | None = None


def install(registry: LeaseRegistry | None) -> None:
    """Make `registry` the one of this process (None: a process without leases)."""
    global _current
    _current = registry


def installed() -> LeaseRegistry | None:
    """The process's registry, if it has one."""
    return _current


def current() -> LeaseRegistry:
    """The process's registry. Raises `RuntimeError` when none was installed."""
    if _current is None:
        raise RuntimeError("no lease registry was installed in this process")
    return _current
