"""Conversations: items in order, kept in Redis for a time after the last change.

A response that takes part locks its conversation (`pending`); what it said is added when somebody
next looks, so nothing is lost with the process that made it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from broker import keys, scripts
from broker.connections import translate
from broker.errors import IdempotencyConflictError
from broker.idempotency import LIFETIME_MS, name_digest

#: Id of an item, and the item as JSON.
Item = tuple[str, bytes]


class ConversationNotFoundError(Exception):
    """No such conversation, or it belongs to another tenant."""


class TooManyConversationsError(Exception):
    """The tenant has as many conversations as it may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    id: str
    tenant: str
    created_ms: int
    #: The caller's own `metadata` as JSON.
    metadata: bytes = b"{}"
    #: Job of the response that takes part and isn't settled; empty when there is none.
    pending: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """The caller's own name for a request, and a digest of what the request is."""

    key: str
    request: str


class RedisConversations:
    """Every call may raise `BrokerUnavailableError`."""

    def __init__(self, client: redis.asyncio.Redis, *, ttl_s: int, most: int) -> None:
        """`most`: conversations of one tenant."""
        # Untyped in redis-py.
        self._client: Any = client
        self._converse: Any = self._client.register_script(scripts.CONVERSE.source)
        self._open: Any = client.register_script(scripts.OPEN_CONVERSATION.source)
        self._ttl_s = ttl_s
        self._most = most

    async def create(
        self, conversation: Conversation, items: Sequence[Item], named: Named | None = None
    ) -> str:
        """Its id, or that of the one which was made under this name before.

        Raises `TooManyConversationsError` and `IdempotencyConflictError`.
        """
        tenant = conversation.tenant
        name = keys.idempotency(tenant, name_digest(named.key)) if named else ""
        flat = [part for item in items for part in item]
        async with _translated():
            made = await self._open(
                keys=[
                    keys.conversation(conversation.id),
                    keys.tenant_conversations(tenant),
                    keys.conversation_items(conversation.id),
                ],
                args=[
                    conversation.id,
                    tenant,
                    conversation.created_ms,
                    conversation.metadata,
                    self._ttl_s,
                    self._most,
                    name,
                    named.request if named else "",
                    LIFETIME_MS,
                    *flat,
                ],
            )
        if made[0] == 0:
            raise TooManyConversationsError
        first = made[1].decode()
        if made[0] == 2:
            raise IdempotencyConflictError(first)
        return str(first)

    async def get(self, conversation_id: str, tenant: str) -> Conversation:
        """Raises `ConversationNotFoundError`."""
        async with _translated():
            raw = await self._client.hgetall(keys.conversation(conversation_id))
        if raw.get(b"tenant") != tenant.encode():
            raise ConversationNotFoundError
        return Conversation(
            id=conversation_id,
            tenant=tenant,
            created_ms=int(raw[b"created_ms"]),
            metadata=raw[b"metadata"],
            pending=raw.get(b"pending", b"").decode(),
        )

    async def update(self, conversation_id: str, metadata: bytes) -> None:
        async with _translated():
            await self._client.hset(keys.conversation(conversation_id), "metadata", metadata)
        await self.add(conversation_id, ())

    async def delete(self, conversation_id: str, tenant: str) -> None:
        """`tenant` has to be its owner."""
        async with _translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.delete(
                keys.conversation(conversation_id), keys.conversation_items(conversation_id)
            )
            pipe.zrem(keys.tenant_conversations(tenant), conversation_id)
            await pipe.execute()

    async def items(self, conversation_id: str) -> list[bytes]:
        """All items, oldest first."""
        async with _translated():
            values = await self._client.hvals(keys.conversation_items(conversation_id))
        placed = [value.partition(b"|") for value in values]
        return [item for _, _, item in sorted(placed, key=lambda parts: int(parts[0]))]

    async def add(self, conversation_id: str, items: Sequence[Item]) -> None:
        await self._call(conversation_id, "", items)

    async def remove(self, conversation_id: str, item_id: str) -> bool:
        async with _translated():
            key = keys.conversation_items(conversation_id)
            return bool(await self._client.hdel(key, item_id))

    async def lock(self, conversation_id: str, job_id: str) -> bool:
        """Let the response of a job take part. False: another one does."""
        async with _translated():
            key = keys.conversation(conversation_id)
            return bool(await self._client.hsetnx(key, "pending", job_id))

    async def settle(self, conversation_id: str, job_id: str, items: Sequence[Item]) -> None:
        """Add what a response said and unlock; nothing when that was done before."""
        await self._call(conversation_id, job_id, items)

    async def _call(self, conversation_id: str, job_id: str, items: Sequence[Item]) -> None:
        flat = [part for item in items for part in item]
        names = [keys.conversation(conversation_id), keys.conversation_items(conversation_id)]
        async with _translated():
            await self._converse(keys=names, args=[job_id, self._ttl_s, *flat])


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise translate(error) from error


@dataclass(slots=True)
class _Kept:
    conversation: Conversation
    items: dict[str, bytes] = field(default_factory=dict)


class MemoryConversations:
    """The same in memory; nothing expires."""

    def __init__(self, *, most: int = 10_000) -> None:
        self._kept: dict[str, _Kept] = {}
        self._named: dict[tuple[str, str], tuple[str, str]] = {}
        self._most = most

    async def create(
        self, conversation: Conversation, items: Sequence[Item], named: Named | None = None
    ) -> str:
        name = (conversation.tenant, named.key if named else "")
        if named and name in self._named:
            request, first = self._named[name]
            if request != named.request:
                raise IdempotencyConflictError(first)
            return first
        tenants = [kept.conversation.tenant for kept in self._kept.values()]
        if tenants.count(conversation.tenant) >= self._most:
            raise TooManyConversationsError
        self._kept[conversation.id] = _Kept(conversation, dict(items))
        if named:
            self._named[name] = named.request, conversation.id
        return conversation.id

    async def get(self, conversation_id: str, tenant: str) -> Conversation:
        kept = self._kept.get(conversation_id)
        if kept is None or kept.conversation.tenant != tenant:
            raise ConversationNotFoundError
        return kept.conversation

    async def update(self, conversation_id: str, metadata: bytes) -> None:
        kept = self._kept[conversation_id]
        kept.conversation = replace(kept.conversation, metadata=metadata)

    async def delete(self, conversation_id: str, tenant: str) -> None:
        self._kept.pop(conversation_id, None)

    async def items(self, conversation_id: str) -> list[bytes]:
        return list(self._kept[conversation_id].items.values())

    async def add(self, conversation_id: str, items: Sequence[Item]) -> None:
        self._kept[conversation_id].items.update(items)

    async def remove(self, conversation_id: str, item_id: str) -> bool:
        return self._kept[conversation_id].items.pop(item_id, None) is not None

    async def lock(self, conversation_id: str, job_id: str) -> bool:
        kept = self._kept[conversation_id]
        if kept.conversation.pending:
            return False
        kept.conversation = replace(kept.conversation, pending=job_id)
        return True

    async def settle(self, conversation_id: str, job_id: str, items: Sequence[Item]) -> None:
        kept = self._kept.get(conversation_id)
        if kept is not None and kept.conversation.pending == job_id:
            kept.conversation = replace(kept.conversation, pending="")
            kept.items.update(items)
