"""The in-memory queue for an event loop: the methods of `MemoryQueue` as coroutines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.jobs import Accepted, Band, Claim, Delta, Event, Job, NewJob, Outcome, Status
from broker.policies import TenantPolicy
from broker.queue import CancelResult, LeaseState
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
from broker.webhooks.outbox import OutboxEvent

if TYPE_CHECKING:
    from broker.memory import MemoryQueue


class AsyncMemoryQueue:
    """Looks at the same jobs as the `MemoryQueue` it is given; never blocks for long."""

    def __init__(self, memory: MemoryQueue) -> None:
        self._memory = memory

    async def enqueue(self, job: NewJob) -> Accepted:
        return self._memory.enqueue(job)

    async def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        return self._memory.get(job_id, tenant=tenant)

    async def was_kept(self, job_id: str, *, tenant: str) -> bool:
        return self._memory.was_kept(job_id, tenant=tenant)

    async def is_named(self, tenant: str, idempotency_key: str) -> bool:
        return self._memory.is_named(tenant, idempotency_key)

    async def list_jobs(
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
        return self._memory.list_jobs(
            tenant,
            status=status,
            model=model,
            band=band,
            created_after_ms=created_after_ms,
            after=after,
            limit=limit,
            newest_first=newest_first,
        )

    async def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        return self._memory.cancel(job_id, tenant=tenant)

    async def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]:
        return self._memory.cancel_many(job_ids, tenant=tenant)

    async def erase(self, job_id: str, *, tenant: str | None = None) -> bool:
        return self._memory.erase(job_id, tenant=tenant)

    async def retry(
        self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0
    ) -> Accepted:
        return self._memory.retry(job_id, tenant=tenant, deadline_ms=deadline_ms)

    async def position(self, job_id: str, *, tenant: str | None = None) -> Position | None:
        return self._memory.position(job_id, tenant=tenant)

    async def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]:
        return self._memory.events(job_id, after=after)

    async def text(self, job_id: str) -> str:
        return self._memory.text(job_id)

    async def announce(self, event: OutboxEvent) -> bool:
        return self._memory.announce(event)

    async def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        return self._memory.claim(queue, owner, limit=limit, batch_room=batch_room)

    async def wake(self, queue: str, owner: str) -> None:
        self._memory.wake(queue, owner)

    async def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> dict[str, LeaseState]:
        return self._memory.renew(queue, owner, leases)

    async def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        return self._memory.emit(queue, deltas)

    async def complete(self, claim: Claim, outcome: Outcome) -> bool:
        return self._memory.complete(claim, outcome)

    async def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        return self._memory.requeue(claim, delay_ms=delay_ms, refund=refund)

    async def bury(self, claim: Claim, error_code: str, message: str) -> bool:
        return self._memory.bury(claim, error_code, message)

    async def release_owner(self, queue: str, owner: str) -> int:
        return self._memory.release_owner(queue, owner)

    async def sweep(self, queue: str) -> int:
        return self._memory.sweep(queue)

    async def count_claimable(
        self, queue: str, most: int, *, batch_room: int | None = None
    ) -> Claimable:
        return self._memory.count_claimable(queue, most, batch_room=batch_room)

    # -- dead letters -----------------------------------------------------------------------------
    async def dead_letters(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[DeadLetter], bool]:
        return self._memory.dead_letters(
            queue, tenant=tenant, job_id=job_id, after=after, limit=limit
        )

    async def replay_dead(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        limit: int = 1_000,
    ) -> list[str]:
        return self._memory.replay_dead(queue, tenant=tenant, job_id=job_id, limit=limit)

    async def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int:
        return self._memory.purge_dead(queue, tenant=tenant, job_id=job_id)

    async def set_policy(self, tenant: str, policy: TenantPolicy | None) -> None:
        self._memory.set_policy(tenant, policy)

    async def pause(self, queue: str) -> None:
        self._memory.pause(queue)

    async def drain(self, queue: str) -> None:
        self._memory.drain(queue)

    async def resume(self, queue: str) -> None:
        self._memory.resume(queue)

    async def stats(self, queue: str, *, top: int = 20) -> QueueStats:
        return self._memory.stats(queue, top=top)

    async def tenant_queue(self, queue: str, tenant: str) -> TenantQueue:
        return self._memory.tenant_queue(queue, tenant)

    async def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage:
        return self._memory.usage(tenant, hours=hours, model=model)

    async def leases(
        self, queue: str, *, owner: str | None = None, limit: int = 100
    ) -> list[LeaseStats]:
        return self._memory.leases(queue, owner=owner, limit=limit)

    async def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        self._memory.heartbeat(status, ttl_s=ttl_s)

    async def workers(self) -> list[WorkerStatus]:
        return self._memory.workers()

    async def forget_worker(self, owner: str) -> None:
        self._memory.forget_worker(owner)

    async def queues(self) -> list[str]:
        return self._memory.queues()

    async def ping(self) -> None:
        self._memory.ping()
