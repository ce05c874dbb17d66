"""A job on its way through Celery's worker: stopping and failing go through its lease."""

from __future__ import annotations

from typing import Any

from celery.worker import state
from celery.worker.request import Request

from broker import leases
from config.logs import get_logger

log = get_logger(__name__)


class JobRequest(Request):  # type: ignore[misc]
    """Celery's request, whose revocations are cancels and hand-backs of the job.

    A revoked job still runs its task, which finds the lease cancelled and settles it. So there is
    one way for a job to end, and its record tells of it.
    """

    def revoked(self) -> bool:
        if self.id in state.revoked:
            leases.current().cancel(self.id)
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`control.revoke(terminate=True)`, or Flower's Terminate: cancel the job."""
        leases.current().cancel(self.id)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown: nobody asked for the job to end, so another worker gets it."""
        leases.current().hand_back(self.id)

    def send_event(self, type: str, **fields: Any) -> None:
        """Events are a courtesy: the job doesn't fail for want of a listener."""
        try:
            super().send_event(type, **fields)
        except Exception as error:
            log.debug("task_event_lost", event_type=type, error=repr(error))
