"""The exception tree of the broker."""

from __future__ import annotations


class BrokerError(Exception):
    """Anything the broker can't do."""


class BrokerUnavailableError(BrokerError):
    """Redis can't be reached, is loading, is read-only or refuses writes; try again later."""


class QueueFullError(BrokerError):
    """The tenant's queue, or the model's queue as a whole, has reached its bound."""

    def __init__(self, scope: str, limit: int) -> None:
        super().__init__(f"{scope} queue is full ({limit} jobs)")
        #: `tenant` or `model`.
        self.scope = scope
        self.limit = limit


class DuplicateJobError(BrokerError):
    """A job with this id exists already; nothing was written."""


class IdempotencyConflictError(BrokerError):
    """The idempotency key was used for another request; nothing was written."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the idempotency key belongs to {job_id}")
        #: The job of the first request.
        self.job_id = job_id


class NotRetryableError(BrokerError):
    """The job is neither failed nor expired."""

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"{job_id} is {status}")
        self.job_id = job_id
        self.status = status


class JobNotFoundError(BrokerError):
    """No such job, or it belongs to another tenant, or its result has expired."""


class StaleAttemptError(BrokerError):
    """The lease of this attempt is gone; its writes were refused and changed nothing."""
