"""The queue on Redis, for one event loop: the methods of `RedisQueue` as coroutines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError

from broker.call import Call
from broker.calls import RELEASE_BATCH, Calls
from broker.connections import translate
from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.exchange import Exchange
from broker.jobs import Accepted, Band, Claim, Delta, Event, Job, NewJob, Outcome, Status
from broker.outages import OutageLog
from broker.policies import TenantPolicy
from broker.queue import CancelResult, LeaseState
from broker.reading_calls import Listing
from broker.stats import (
    Claimable,
    DeadLetter,
    LeaseStats,
    Position,
    QueueStats,
    TenantQueue,
    WorkerStatus,
)
from broker.submitting_calls import CANCEL_BATCH, REPLAY_BATCH
from broker.usage import TenantUsage
from broker.webhooks.outbox import OutboxEvent
from config.settings import Queue as QueueSettings

T = TypeVar("T")


class AsyncRedisQueue:
    """`JobQueue` as coroutines; the same promises as `RedisQueue`."""

    def __init__(self, client: redis.asyncio.Redis, settings: QueueSettings) -> None:
        self._exchange = Exchange(client)
        self._calls = Calls(settings)
        self._outages = OutageLog()

    async def _run(self, call: Call[T]) -> T:
        try:
            result = await self._answer(call)
        except BrokerUnavailableError as error:
            self._outages.failed(str(error))
            raise
        if self._outages.open:
            self._outages.worked()
        return result

    async def _answer(self, call: Call[T]) -> T:
        repeated = False
        while True:
            try:
                replies = await self._exchange.send(call.commands)
                if isinstance(replies[0], NoScriptError):
                    replies = await self._exchange.send(call.by_source)
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply
            except RedisConnectionError as error:
                if type(error) is not RedisConnectionError or repeated or not call.repeatable:
                    raise translate(error) from error
                repeated = True
            except ReadOnlyError as error:
                # Nothing was written, and that connection is given up.
                if repeated:
                    raise translate(error) from error
                repeated = True
            except (RedisError, OSError) as error:
                raise translate(error) from error
            else:
                return call.decode(replies, repeated)

    # -- submitting side --------------------------------------------------------------------------
    async def enqueue(self, job: NewJob) -> Accepted:
        return await self._run(self._calls.enqueue(job))

    async def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        return await self._run(self._calls.get(job_id, tenant))

    async def was_kept(self, job_id: str, *, tenant: str) -> bool:
        return await self._run(self._calls.was_kept(job_id, tenant))

    async def is_named(self, tenant: str, idempotency_key: str) -> bool:
        """Whether the tenant has used this idempotency key in the last 24 hours."""
        return await self._run(self._calls.is_named(tenant, idempotency_key))

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
        listing = Listing(
            tenant=tenant,
            status=status,
            model=model,
            band=band,
            created_after_ms=created_after_ms,
            after=after,
            limit=limit,
            newest_first=newest_first,
        )
        while not listing.done:
            listing.feed(await self._run(listing.call()))
        return listing.page

    async def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        results = await self.cancel_many([job_id], tenant=tenant)
        if job_id not in results:
            raise JobNotFoundError(job_id)
        return results[job_id]

    async def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]:
        results: dict[str, CancelResult] = {}
        for k in range(0, len(job_ids), CANCEL_BATCH):
            call = self._calls.cancel(job_ids[k : k + CANCEL_BATCH], tenant)
            batch = await self._run(call)
            results.update(batch)
        return results

    async def erase(self, job_id: str, *, tenant: str | None = None) -> bool:
        return await self._run(self._calls.erase(job_id, tenant))

    async def retry(
        self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0
    ) -> Accepted:
        return await self._run(self._calls.retry(job_id, tenant, deadline_ms))

    async def position(self, job_id: str, *, tenant: str | None = None) -> Position | None:
        return await self._run(self._calls.position(job_id, tenant))

    async def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]:
        return await self._run(self._calls.events(job_id, after))

    async def text(self, job_id: str) -> str:
        return await self._run(self._calls.text(job_id))

    async def announce(self, event: OutboxEvent) -> bool:
        """Have webhooks told; False when nobody of the tenant wants to hear of anything."""
        return await self._run(self._calls.announce(event))

    # -- working side -----------------------------------------------------------------------------
    async def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        return await self._run(self._calls.claim(queue, owner, limit, batch_room))

    async def wake(self, queue: str, owner: str) -> None:
        await self._run(self._calls.wake(queue, owner))

    async def load_scripts(self) -> None:
        """Make all scripts known to the server."""
        await self._run(self._calls.load_scripts())

    async def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> dict[str, LeaseState]:
        return await self._run(self._calls.renew(queue, owner, leases)) if leases else {}

    async def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        return await self._run(self._calls.emit(queue, deltas)) if deltas else []

    async def complete(self, claim: Claim, outcome: Outcome) -> bool:
        return await self._run(self._calls.complete(claim, outcome))

    async def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        return await self._run(self._calls.requeue(claim, delay_ms, refund))

    async def bury(self, claim: Claim, error_code: str, message: str) -> bool:
        return await self._run(self._calls.bury(claim, error_code, message))

    async def release_owner(self, queue: str, owner: str) -> int:
        total = 0
        while True:
            count = await self._run(self._calls.release_owner(queue, owner))
            total += count
            if count < RELEASE_BATCH:
                return total

    async def sweep(self, queue: str) -> int:
        return await self._run(self._calls.sweep(queue))

    async def count_claimable(
        self, queue: str, most: int, *, batch_room: int | None = None
    ) -> Claimable:
        return await self._run(self._calls.count_claimable(queue, most, batch_room))

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
        return await self._run(self._calls.dead_letters(queue, tenant, job_id, after, limit))

    async def replay_dead(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        limit: int = 1_000,
    ) -> list[str]:
        replayed: list[str] = []
        while len(replayed) < limit:
            batch = min(limit - len(replayed), REPLAY_BATCH)
            ids = await self._run(self._calls.replay_dead(queue, tenant, job_id, batch))
            replayed += ids
            if len(ids) < batch:
                break
        return replayed

    async def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int:
        return await self._run(self._calls.purge_dead(queue, tenant, job_id))

    # -- policy and readings ----------------------------------------------------------------------
    async def set_policy(self, tenant: str, policy: TenantPolicy | None) -> None:
        await self._run(self._calls.set_policy(tenant, policy, await self.queues()))

    async def pause(self, queue: str) -> None:
        await self._run(self._calls.set_mode(queue, "paused"))

    async def drain(self, queue: str) -> None:
        await self._run(self._calls.set_mode(queue, "draining"))

    async def resume(self, queue: str) -> None:
        await self._run(self._calls.set_mode(queue, "running"))

    async def stats(self, queue: str, *, top: int = 20) -> QueueStats:
        return await self._run(self._calls.stats(queue, top))

    async def tenant_queue(self, queue: str, tenant: str) -> TenantQueue:
        return await self._run(self._calls.tenant_queue(queue, tenant))

    async def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage:
        return await self._run(self._calls.usage(tenant, hours, model))

    async def leases(
        self, queue: str, *, owner: str | None = None, limit: int = 100
    ) -> list[LeaseStats]:
        return await self._run(self._calls.leases(queue, owner, limit))

    async def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        await self._run(self._calls.heartbeat(status, ttl_s))

    async def workers(self) -> list[WorkerStatus]:
        owners = await self._run(self._calls.worker_names())
        return await self._run(self._calls.workers(owners)) if owners else []

    async def forget_worker(self, owner: str) -> None:
        await self._run(self._calls.forget_worker(owner))

    async def queues(self) -> list[str]:
        return await self._run(self._calls.queues())

    async def ping(self) -> None:
        await self._run(self._calls.ping())
