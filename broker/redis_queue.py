"""The queue on Redis, for threads. Its twin for an event loop is `AsyncRedisQueue`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from broker.async_queue import AsyncRedisQueue
from broker.call import Call
from broker.calls import RELEASE_BATCH, Calls
from broker.connections import translate
from broker.errors import JobNotFoundError
from broker.jobs import Accepted, Band, Claim, Delta, Event, Job, NewJob, Outcome, Status
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
from broker.wire import Arg, pack
from config.settings import Queue as QueueSettings

__all__ = ["AsyncRedisQueue", "RedisQueue"]

T = TypeVar("T")


class RedisQueue:
    """`JobQueue` on a sync client; thread-safe.

    A call whose connection breaks before the answer is sent once more, unless a repeat would do
    harm; a job that such a repeat finds in the queue is our own and no duplicate.
    """

    def __init__(self, client: redis.Redis, settings: QueueSettings) -> None:
        # Untyped in redis-py.
        self._pool: Any = client.connection_pool
        self._calls = Calls(settings)

    def _run(self, call: Call[T]) -> T:
        repeated = False
        while True:
            try:
                replies = self._send(call.commands)
                if isinstance(replies[0], NoScriptError):
                    replies = self._send(call.by_source)
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

    def _send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        connection = self._pool.get_connection()
        try:
            connection.send_packed_command([pack(commands)])
            replies: list[Any] = []
            demoted = False
            for _ in commands:
                try:
                    replies.append(connection.read_response())
                except ResponseError as error:
                    replies.append(error)
                    demoted = demoted or isinstance(error, ReadOnlyError)
            if demoted:  # it was the primary; whoever is now is found by connecting
                connection.disconnect()
        except BaseException:
            # Answers may be left on the wire.
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)
        return replies

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> Accepted:
        return self._run(self._calls.enqueue(job))

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        return self._run(self._calls.get(job_id, tenant))

    def was_kept(self, job_id: str, *, tenant: str) -> bool:
        return self._run(self._calls.was_kept(job_id, tenant))

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
            listing.feed(self._run(listing.call()))
        return listing.page

    def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        results = self.cancel_many([job_id], tenant=tenant)
        if job_id not in results:
            raise JobNotFoundError(job_id)
        return results[job_id]

    def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]:
        results: dict[str, CancelResult] = {}
        for k in range(0, len(job_ids), CANCEL_BATCH):
            call = self._calls.cancel(job_ids[k : k + CANCEL_BATCH], tenant)
            batch = self._run(call)
            results.update(batch)
        return results

    def erase(self, job_id: str, *, tenant: str | None = None) -> bool:
        return self._run(self._calls.erase(job_id, tenant))

    def retry(self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0) -> Accepted:
        return self._run(self._calls.retry(job_id, tenant, deadline_ms))

    def position(self, job_id: str, *, tenant: str | None = None) -> Position | None:
        return self._run(self._calls.position(job_id, tenant))

    def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]:
        return self._run(self._calls.events(job_id, after))

    def text(self, job_id: str) -> str:
        return self._run(self._calls.text(job_id))

    # -- working side -----------------------------------------------------------------------------
    def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        return self._run(self._calls.claim(queue, owner, limit, batch_room))

    def wake(self, queue: str, owner: str) -> None:
        self._run(self._calls.wake(queue, owner))

    def claim_command(
        self, queue: str, owner: str, limit: int, batch_room: int | None = None
    ) -> list[Arg]:
        """The claim as one command, for a caller that sends it on a connection of its own.

        The reply goes through `decode_claims`; NOSCRIPT asks for `load_scripts` and a repeat.
        """
        return list(self._calls.claim(queue, owner, limit, batch_room).commands[0])

    def decode_claims(self, queue: str, reply: list[Any]) -> list[Claim]:
        return self._calls.decode_claims(queue, reply)

    def more_waits(self, reply: list[Any]) -> bool:
        """Whether the claim with this reply has left work behind that it might have taken."""
        return self._calls.more_waits(reply)

    def load_scripts(self) -> None:
        """Make all scripts known to the server."""
        self._run(self._calls.load_scripts())

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> dict[str, LeaseState]:
        return self._run(self._calls.renew(queue, owner, leases)) if leases else {}

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        return self._run(self._calls.emit(queue, deltas)) if deltas else []

    def complete(self, claim: Claim, outcome: Outcome) -> bool:
        return self._run(self._calls.complete(claim, outcome))

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        return self._run(self._calls.requeue(claim, delay_ms, refund))

    def bury(self, claim: Claim, error_code: str, message: str) -> bool:
        return self._run(self._calls.bury(claim, error_code, message))

    def release_owner(self, queue: str, owner: str) -> int:
        total = 0
        while True:
            count = self._run(self._calls.release_owner(queue, owner))
            total += count
            if count < RELEASE_BATCH:
                return total

    def sweep(self, queue: str) -> int:
        return self._run(self._calls.sweep(queue))

    def count_claimable(self, queue: str, most: int, *, batch_room: int | None = None) -> Claimable:
        return self._run(self._calls.count_claimable(queue, most, batch_room))

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
        return self._run(self._calls.dead_letters(queue, tenant, job_id, after, limit))

    def replay_dead(
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
            ids = self._run(self._calls.replay_dead(queue, tenant, job_id, batch))
            replayed += ids
            if len(ids) < batch:
                break
        return replayed

    def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int:
        return self._run(self._calls.purge_dead(queue, tenant, job_id))

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(self, tenant: str, policy: TenantPolicy | None) -> None:
        self._run(self._calls.set_policy(tenant, policy, self.queues()))

    def pause(self, queue: str) -> None:
        self._run(self._calls.set_mode(queue, "paused"))

    def drain(self, queue: str) -> None:
        self._run(self._calls.set_mode(queue, "draining"))

    def resume(self, queue: str) -> None:
        self._run(self._calls.set_mode(queue, "running"))

    def stats(self, queue: str, *, top: int = 20) -> QueueStats:
        return self._run(self._calls.stats(queue, top))

    def tenant_queue(self, queue: str, tenant: str) -> TenantQueue:
        return self._run(self._calls.tenant_queue(queue, tenant))

    def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage:
        return self._run(self._calls.usage(tenant, hours, model))

    def leases(self, queue: str, *, owner: str | None = None, limit: int = 100) -> list[LeaseStats]:
        return self._run(self._calls.leases(queue, owner, limit))

    def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        self._run(self._calls.heartbeat(status, ttl_s))

    def workers(self) -> list[WorkerStatus]:
        owners = self._run(self._calls.worker_names())
        return self._run(self._calls.workers(owners)) if owners else []

    def forget_worker(self, owner: str) -> None:
        self._run(self._calls.forget_worker(owner))

    def queues(self) -> list[str]:
        return self._run(self._calls.queues())

    def ping(self) -> None:
        self._run(self._calls.ping())
