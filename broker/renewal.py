"""Keeps leases alive, and finds those that were lost."""

from __future__ import annotations

import time

from broker.lease import Lease, LeaseTable
from broker.queue import JobQueue
from config.logs import get_logger

log = get_logger(__name__)

#: Time between a completion in the broker and its settling here, at most (s).
SETTLING_S = 0.1


class Renewal:
    """Renews the leases in a table. All of it runs in the registry's own thread."""

    def __init__(
        self, queue: JobQueue, leases: LeaseTable, *, queue_name: str, owner: str, ttl_s: float
    ) -> None:
        self._queue = queue
        self._leases = leases
        self._queue_name = queue_name
        self._owner = owner
        self._ttl_s = ttl_s
        #: Leases lost since the start.
        self.losses = 0

    def renew(self) -> None:
        """Renew all leases; one that the broker doesn't know, asked twice, is lost."""
        if self._ask():
            # A job that is just being completed has no lease any more and isn't lost.
            time.sleep(SETTLING_S)
            for lease in self._ask():
                self._lose(lease)

    def _ask(self) -> list[Lease]:
        """Renew all leases; returns those that the broker doesn't know."""
        leases = [lease for lease in self._leases.all() if not lease.lost.is_set()]
        if not leases:
            return []
        asked = time.monotonic()
        names = [(lease.claim.job.id, lease.claim.attempt) for lease in leases]
        answers = self._queue.renew(self._queue_name, self._owner, names)
        unknown = []
        for lease in leases:
            answer = answers.get(lease.claim.job.id, "lost")
            if answer == "lost":
                unknown.append(lease)
                continue
            lease.renewed = asked
            if answer == "cancel":
                lease.stop(lease.cancelled)
        return unknown

    def give_up_overdue(self) -> None:
        """A lease that couldn't be renewed within its time to live counts as lost."""
        now = time.monotonic()
        for lease in self._leases.all():
            if now - lease.renewed >= self._ttl_s:
                self._lose(lease)

    def _lose(self, lease: Lease) -> None:
        if lease.lost.is_set() or self._leases.find(lease.claim.job.id) is not lease:
            return  # known already, or settled meanwhile
        self._leases.remove(lease, unless_started=True)
        self.losses += 1
        log.warning("lease_lost", job_id=lease.claim.job.id, attempt=lease.claim.attempt)
        lease.stop(lease.lost)
