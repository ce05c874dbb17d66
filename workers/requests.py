"""A job on its way through Celery's worker: stopping and failing go through its lease."""

from __future__ import annotations

from typing import Any

from celery.worker import state
from celery.worker.request import Request

from broker import leases
from config.logs import get_logger
from workers import turns

log = get_logger(__name__)


class JobRequest(Request):  # type: ignore[misc]
    """Celery's request, whose revocations are cancels and hand-backs of the job.

    A revoked job still runs its task, which finds the lease cancelled and settles it. So there is
    one way for a job to end, and its record tells of it.
    """

    @property
    def job_id(self) -> str:
        return str(self.id)

    def revoked(self) -> bool:
        if self.id in state.revoked:
            leases.current().cancel(self.job_id)
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`control.revoke(terminate=True)`, or Flower's Terminate: cancel the job."""
        leases.current().cancel(self.job_id)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown: nobody asked for the job to end, so another worker gets it."""
        leases.current().hand_back(self.job_id)

    def send_event(self, type: str, **fields: Any) -> None:
        """Events are a courtesy: the job doesn't fail for want of a listener."""
        try:
            super().send_event(type, **fields)
        except Exception as error:
            log.debug("task_event_lost", event_type=type, error=repr(error))


class _Unheard:
    """Takes the place of Celery's logger where a failure is nothing to report."""

    def critical(self, *_: Any, **__: Any) -> None:
        log.debug("ticket_not_acknowledged")


class TicketRequest(JobRequest):
    """A ticket on its way; what is done to it is done to the job it has brought."""

    acknowledged: bool

    @property
    def job_id(self) -> str:
        return turns.jobs.get(str(self.id), "")

    def acknowledge(self) -> None:
        """A ticket that came through a lost connection was given to others with it."""
        if not self.acknowledged:
            self._on_ack(_Unheard(), self._connection_errors)
            self.acknowledged = True
