"""The contract of the queue, kept by the Redis implementations and by the in-memory twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from broker.jobs import Accepted, Band, Claim, Delta, Event, Job, NewJob, Outcome, Status
from broker.policies import TenantPolicy
from broker.stats import (
    Claimable,
    DeadLetter,
    LeaseStats,
    Position,
    QueueStats,
    TenantQueue,
    WorkerStatus,
)
from broker.usage import TenantUsage

LeaseState = Literal["ok", "lost", "cancel"]
CancelResult = Literal["cancelled", "cancelling", "terminal"]


class JobQueue(Protocol):
    """All that can be done with jobs.

    `RedisQueue` (workers, threads) keeps it as written; `AsyncRedisQueue` (API) has the same
    methods as coroutines. Every call may raise `BrokerUnavailableError`; every write is idempotent
    on job id and attempt, so that a repeat after a lost answer is harmless.
    """

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> Accepted:
        """Put a job in, or find the one that its idempotency key stands for.

        The key is kept in the same step: whoever lost the answer asks again with the same key, and
        gets the job if there is one. A job that was replayed may have ended and even expired.
        Raises `QueueFullError` (of a tenant; `OverloadedError`: the model sheds this band),
        `RateLimitedError`, `QueueDrainingError`, `DuplicateJobError` or `IdempotencyConflictError`;
        then nothing was written, and nothing taken of any limit.
        """
        ...

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        """The job record. Raises `JobNotFoundError`, also when `tenant` isn't its owner."""
        ...

    def was_kept(self, job_id: str, *, tenant: str) -> bool:
        """Whether the tenant is still known to have had this job; for some time after it expired.

        At most eight days from its submit; ids of expired jobs are dropped one by one.
        """
        ...

    def list_jobs(
        self,
        tenant: str,
        *,
        status: Status | None = None,
        model: str | None = None,
        band: Band | None = None,
        created_after_ms: int = 0,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        """A page of the tenant's jobs (without body and output) and whether more follow."""
        ...

    def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        """Queued or delayed → gone at once; running → flagged. Raises `JobNotFoundError`."""
        ...

    def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]:
        """Cancel many at once; ids without a job (of the tenant) are left out of the answer."""
        ...

    def erase(self, job_id: str, *, tenant: str | None = None) -> bool:
        """Cancel a job that hasn't ended, and erase prompt, output, text and metadata.

        A stub without content stays for eight days. False: its worker has to stop first; what it
        still brings is dropped. Raises `JobNotFoundError`.
        """
        ...

    def retry(self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0) -> Accepted:
        """Put a failed or expired job in again, at the tail; all its attempts are its own again.

        Its old deadline is dropped; a dead letter of it is, too. Attempt and event numbers go on.
        It is under the limits it was submitted with. Raises `NotRetryableError` in another state,
        `JobNotFoundError`, `QueueFullError`, `RateLimitedError`, `QueueDrainingError`.
        """
        ...

    def position(self, job_id: str, *, tenant: str | None = None) -> Position | None:
        """Where a waiting job stands and when it may start; None when it doesn't wait.

        Raises `JobNotFoundError`.
        """
        ...

    def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]:
        """Logged events with seq > after, and whether the log still reaches back that far."""
        ...

    def text(self, job_id: str) -> str:
        """Text of the latest attempt so far (streaming jobs)."""
        ...

    # -- working side -----------------------------------------------------------------------------
    def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        """Lease up to `limit` jobs in fair order, after taking back expired leases and due delays.

        At most `batch_room` of them are batch jobs (None: any number).

        A job whose attempts are used up is failed (`max_attempts`) and kept as a dead letter; one
        that waited beyond its deadline expires without being leased, wherever it stood.
        """
        ...

    def wake(self, queue: str, owner: str) -> None:
        """Let a worker that waits for other work know that it has room for batch jobs again."""
        ...

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> dict[str, LeaseState]:
        """Prolong leases named as (job id, attempt)."""
        ...

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        """Log and publish text of running attempts; returns the ids whose attempt was stale."""
        ...

    def complete(self, claim: Claim, outcome: Outcome) -> bool:
        """Fenced: make the job terminal, settle its cost, publish. False: stale, nothing changed.

        A repeat of a completion that already happened with this attempt is True.
        """
        ...

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        """Fenced: give the job back at the head of its tenant's queue. False: stale.

        With `refund` the attempt does not count (the job never started).
        """
        ...

    def bury(self, claim: Claim, error_code: str, message: str) -> bool:
        """Fenced: fail the job and keep it as a dead letter. False: stale."""
        ...

    def release_owner(self, queue: str, owner: str) -> int:
        """Give back all leases of a worker that is known to be gone; returns how many."""
        ...

    def sweep(self, queue: str) -> int:
        """Do what a claim does before it leases; requeue jobs found nowhere; heal the bell.

        Returns how many were put back.
        """
        ...

    def count_claimable(self, queue: str, most: int, *, batch_room: int | None = None) -> Claimable:
        """How many jobs could be claimed now, up to `most`; does first what a claim does first.

        Batch jobs are counted apart where the caller has room for `batch_room` of them (None: for
        any number), and up to that.

        For brokers that announce jobs one by one (`broker.tickets`). A tenant whose cap was lowered
        below what it runs counts for one job until the next claim finds out.
        """
        ...

    # -- dead letters -----------------------------------------------------------------------------
    def dead_letters(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[DeadLetter], bool]:
        """A page of letters, newest first, and whether more follow; `after` is a `letter`."""
        ...

    def replay_dead(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        limit: int = 1_000,
    ) -> list[str]:
        """Retry jobs of dead letters, oldest first, as far as there is room; returns their ids.

        Rate limits are charged and hold none of them up.

        Not repeated when an answer is lost: what was replayed by then is no dead letter any more.
        """
        ...

    def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int:
        """Drop dead letters; the jobs' records live out their time. Returns how many."""
        ...

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(self, tenant: str, policy: TenantPolicy | None) -> None:
        """Publish a tenant's weight and bounds (None: the defaults); unparks where it now fits."""
        ...

    def pause(self, queue: str) -> None:
        """Claims find nothing until `resume`; jobs are taken, expire and are cancelled as ever."""
        ...

    def drain(self, queue: str) -> None:
        """Nothing new is taken (`QueueDrainingError`) until `resume`; what is there still runs."""
        ...

    def resume(self, queue: str) -> None:
        """End `pause` or `drain`; of the two, the later one counts."""
        ...

    def stats(self, queue: str, *, top: int = 20) -> QueueStats: ...

    def tenant_queue(self, queue: str, tenant: str) -> TenantQueue:
        """What one tenant has in a queue; a band's age is that of its first job."""
        ...

    def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage:
        """What a tenant's jobs took that ended in the last `hours`, the running one being the last.

        At most `broker.usage.MOST_HOURS`. Each end counts once, whoever told of it how often.
        """
        ...

    def leases(self, queue: str, *, owner: str | None = None, limit: int = 100) -> list[LeaseStats]:
        """Running jobs and who holds them, those first whose lease runs out first.

        Times of renewal are told from this process's lease time. With an owner it looks at all
        leases: for a console, not a loop.
        """
        ...

    def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        """Say that a worker lives; forgotten after `ttl_s`."""
        ...

    def workers(self) -> list[WorkerStatus]: ...

    def forget_worker(self, owner: str) -> None: ...

    def queues(self) -> list[str]: ...

    def ping(self) -> None: ...
