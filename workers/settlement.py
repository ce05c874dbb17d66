"""Tells the broker how an attempt ended, for as long as that is the attempt's to tell."""

from __future__ import annotations

from collections.abc import Callable

from broker.errors import BrokerUnavailableError
from broker.jobs import Outcome, Usage
from broker.leases import Lease
from broker.queue import JobQueue
from config.logs import get_logger

log = get_logger(__name__)

#: Pause between two tries while the broker is away; the lease bounds their number.
_RETRY_S = 0.25

#: How an attempt ended: status (`requeued` and `lost` beside those of a job), error code, usage.
Ending = tuple[str, str, Usage]


class Settlement:
    """The fenced writes that end one attempt."""

    def __init__(self, queue: JobQueue, lease: Lease, *, before: Callable[[], None]) -> None:
        """`before` is called before each try to complete the job."""
        self._queue = queue
        self._lease = lease
        self._before = before

    def complete(self, outcome: Outcome) -> Ending:
        def complete() -> bool:
            self._before()
            return self._queue.complete(self._lease.claim, outcome)

        if not self._until_lost(complete):
            return self.dropped()
        code = outcome.error.code if outcome.error else ""
        return outcome.status.value, code, outcome.usage

    def give_back(self) -> Ending:
        """Back into the queue, for another attempt."""
        if not self._until_lost(lambda: self._queue.requeue(self._lease.claim)):
            return self.dropped()
        return "requeued", "", Usage()

    def dropped(self) -> Ending:
        """The attempt counts no more: the lease was lost, or given back by the registry."""
        return "requeued" if self._lease.handed_back else "lost", "", Usage()

    def _until_lost(self, write: Callable[[], bool]) -> bool:
        """Repeat a fenced write while the broker is away and the lease may still be ours."""
        said = False
        while True:
            try:
                return write()
            except BrokerUnavailableError as error:
                if not said:
                    said = True
                    log.warning("settling_delayed", reason=str(error))
                if self._lease.lost.wait(_RETRY_S):
                    return False
