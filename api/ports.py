"""What the API asks of others: the queue's submitting side as coroutines, events, credentials."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from api.auth.principal import Principal
from broker.conversations import Conversation, Item, Named
from broker.jobs import Accepted, Band, Event, Job, NewJob, Status
from broker.queue import CancelResult
from broker.results import Resync
from broker.stats import DeadLetter, Position, QueueStats, TenantQueue, WorkerStatus
from broker.usage import TenantUsage
from broker.webhooks.outbox import OutboxEvent


class Queue(Protocol):
    """`broker.queue.JobQueue` without its working side; same errors."""

    async def enqueue(self, job: NewJob) -> Accepted: ...

    async def get(self, job_id: str, *, tenant: str | None = None) -> Job: ...

    async def was_kept(self, job_id: str, *, tenant: str) -> bool: ...

    async def is_named(self, tenant: str, idempotency_key: str) -> bool: ...

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
    ) -> tuple[list[Job], bool]: ...

    async def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult: ...

    async def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]: ...

    async def erase(self, job_id: str, *, tenant: str | None = None) -> bool: ...

    async def retry(
        self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0
    ) -> Accepted: ...

    async def position(self, job_id: str, *, tenant: str | None = None) -> Position | None: ...

    async def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]: ...

    async def text(self, job_id: str) -> str: ...

    async def announce(self, event: OutboxEvent) -> bool: ...

    async def stats(self, queue: str, *, top: int = 20) -> QueueStats: ...

    async def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage: ...

    async def tenant_queue(self, queue: str, tenant: str) -> TenantQueue: ...

    async def dead_letters(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[DeadLetter], bool]: ...

    async def replay_dead(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        limit: int = 1_000,
    ) -> list[str]: ...

    async def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int: ...

    async def queues(self) -> list[str]: ...

    async def workers(self) -> list[WorkerStatus]: ...

    async def ping(self) -> None: ...


class Conversations(Protocol):
    """As `broker.conversations.RedisConversations`."""

    async def create(
        self, conversation: Conversation, items: Sequence[Item], named: Named | None = None
    ) -> str: ...

    async def get(self, conversation_id: str, tenant: str) -> Conversation: ...

    async def update(self, conversation_id: str, metadata: bytes) -> None: ...

    async def delete(self, conversation_id: str, tenant: str) -> None: ...

    async def items(self, conversation_id: str) -> list[bytes]: ...

    async def add(self, conversation_id: str, items: Sequence[Item]) -> None: ...

    async def remove(self, conversation_id: str, item_id: str) -> bool: ...

    async def lock(self, conversation_id: str, job_id: str) -> bool: ...

    async def settle(self, conversation_id: str, job_id: str, items: Sequence[Item]) -> None: ...


class Subscription(Protocol):
    """A job's live events, from the moment the context is entered."""

    async def __aenter__(self) -> Subscription: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def next(self, timeout_s: float | None) -> Event | Resync | None:
        """The next event; `Resync` when some may be missing; None after `timeout_s`."""
        ...


class Authenticator(Protocol):
    def authenticate(self, authorization: str | None) -> Principal:
        """Raises `AuthenticationError` and `AuthenticationUnavailableError` of `api.auth`."""
        ...


class Hub(Protocol):
    def subscribe(self, job_id: str) -> Subscription: ...

    def new_job_id(self) -> str: ...
