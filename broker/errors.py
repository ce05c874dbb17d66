"""The exception tree of the broker."""

from __future__ import annotations

from broker.limits import LimitState


class BrokerError(Exception):
    """Anything the broker can't do."""


class BrokerUnavailableError(BrokerError):
    """Redis can't be reached, is loading, is read-only or refuses writes; try again later."""


class QueueFullError(BrokerError):
    """The tenant's waiting jobs have reached their bound."""

    def __init__(self, scope: str, limit: int, retry_after_ms: int) -> None:
        super().__init__(f"{scope} queue is full ({limit} jobs)")
        #: `tenant`, or `model` when it is an `OverloadedError`.
        self.scope = scope
        self.limit = limit
        #: When there is likely to be room again, from the measured drain rate.
        self.retry_after_ms = retry_after_ms


class OverloadedError(QueueFullError):
    """The model's queue as a whole holds too many jobs for one more of this band."""

    def __init__(self, band: str, limit: int, retry_after_ms: int) -> None:
        super().__init__("model", limit, retry_after_ms)
        self.band = band


class QueueDrainingError(BrokerError):
    """The queue takes no new jobs until it is resumed."""


class SchemaVersionError(BrokerError):
    """The data in this Redis was written by an incompatible version of Forebay."""


class RateLimitedError(BrokerError):
    """A limit of the tenant or of its key doesn't let the job in now; nothing was written."""

    def __init__(
        self,
        scope: str,
        kind: str,
        limit: int,
        retry_after_ms: int,
        limits: tuple[LimitState, ...] = (),
    ) -> None:
        super().__init__(f"{scope} limit of {limit} {kind} is reached")
        #: `tenant` or `key`.
        self.scope = scope
        #: `requests` or `tokens` (per minute), or `jobs` (accepted and not terminal).
        self.kind = kind
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        #: All rate limits of the job, for headers.
        self.limits = limits


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
