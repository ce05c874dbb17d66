"""The bound of a tenant's conversations as Redis keeps it: by those that have not expired."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from broker import keys
from broker.connections import connect_async
from broker.conversations import Conversation, RedisConversations, TooManyConversationsError
from config.settings import load


def _new(name: str) -> Conversation:
    return Conversation(id=f"conv_{name}", tenant="acme", created_ms=1)


@pytest.fixture
async def client(broker_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with connect_async(load(_env_file=None, redis={"url": broker_url}).redis) as made:
        yield made


async def test_what_expired_does_not_count(client: redis.asyncio.Redis) -> None:
    store = RedisConversations(client, ttl_s=60, most=2)
    await store.create(_new("a"), [])
    await store.create(_new("b"), [("msg_1", b"{}")])
    with pytest.raises(TooManyConversationsError):
        await store.create(_new("c"), [("msg_1", b"{}")])
    assert await client.exists(keys.conversation("conv_c")) == 0
    assert await store.items("conv_c") == []
    await client.zadd(keys.tenant_conversations("acme"), {"conv_a": 1})
    await store.create(_new("c"), [])
    assert await client.zrange(keys.tenant_conversations("acme"), 0, -1) == [b"conv_b", b"conv_c"]


async def test_a_change_of_what_has_expired_leaves_nothing(client: redis.asyncio.Redis) -> None:
    store = RedisConversations(client, ttl_s=60, most=2)
    await store.update("conv_a", b"{}")
    assert await client.keys("fb:*") == []


async def test_a_change_puts_off_its_end(client: redis.asyncio.Redis) -> None:
    await RedisConversations(client, ttl_s=60, most=2).create(_new("a"), [])
    later = RedisConversations(client, ttl_s=3600, most=2)
    name = keys.tenant_conversations("acme")
    before = await client.zscore(name, "conv_a")
    await later.add("conv_a", [("msg_1", b"{}")])
    after = await client.zscore(name, "conv_a")
    assert before is not None
    assert after is not None
    assert after - before > 3_500_000
    assert await client.ttl(name) > 3_500
    await later.delete("conv_a", "acme")
    assert await client.exists(name) == 0
