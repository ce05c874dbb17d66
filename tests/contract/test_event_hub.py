"""Events as they happen: both hubs, and what the one on Redis does when connections break."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from broker import keys, results
from broker.connections import connect_async
from broker.errors import BrokerUnavailableError
from broker.jobs import MARK, Delta, Event, EventType, new_job_id
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.redis_queue import AsyncRedisQueue
from broker.results import QUEUE_EVENTS, EventHub, MemoryHub, Resync, Subscription
from config.settings import Redis as RedisSettings
from tests.conftest import PATIENCE_S, free_port
from tests.contract.harness import MODEL, new_job, settings


class Desk:
    """A hub and a queue that feeds it."""

    def __init__(self, hub: Any, queue: Any) -> None:
        self.hub = hub
        self.queue = queue

    async def start_job(self) -> str:
        job = new_job(stream=True)
        await self.queue.enqueue(job)
        await self.queue.claim(MODEL, "w1")
        return job.id

    async def emit(self, job_id: str, *texts: str) -> None:
        deltas = [Delta(job_id=job_id, attempt=1, text=text) for text in texts]
        assert await self.queue.emit(MODEL, deltas) == []


@pytest.fixture(params=["memory", "valkey", "redis7"])
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    if request.param == "memory":
        memory = MemoryQueue(settings())
        hub: Any = MemoryHub(memory)
        await hub.start()
        yield Desk(hub, AsyncMemoryQueue(memory))
        await hub.stop()
        return
    url = request.getfixturevalue(f"{request.param}_url")
    async with redis_desk(url) as desk:
        yield desk


@asynccontextmanager
async def redis_desk(url: str) -> AsyncIterator[Desk]:
    client = connect_async(RedisSettings(url=url))
    await client.flushall()
    hub = EventHub(client)
    await hub.start()
    try:
        yield Desk(hub, AsyncRedisQueue(client, settings()))
    finally:
        await hub.stop()
        await client.aclose()


async def test_a_subscriber_hears_everything_from_its_entry_on(desk: Desk) -> None:
    job = new_job(stream=True)
    async with desk.hub.subscribe(job.id) as events:
        await desk.queue.enqueue(job)
        (claim,) = await desk.queue.claim(MODEL, "w1")
        await desk.emit(job.id, "a", "b")
        await desk.queue.requeue(claim)
        await desk.queue.cancel(job.id)
        heard = [await events.next(10) for _ in range(5)]
    assert heard == [
        Event(seq=2, type=EventType.IN_PROGRESS, attempt=1),
        Event(seq=3, type=EventType.DELTA, attempt=1, text="a"),
        Event(seq=4, type=EventType.DELTA, attempt=1, text="b"),
        Event(seq=5, type=EventType.REQUEUED, attempt=1),
        Event(seq=6, type=EventType.CANCELLED, attempt=1),
    ]


async def test_silence_ends_with_none(desk: Desk) -> None:
    async with desk.hub.subscribe("job_silent") as events:
        assert await events.next(0.01) is None
        assert await events.next(0) is None


async def test_subscribers_of_one_job_and_of_others(desk: Desk) -> None:
    job_id = await desk.start_job()
    async with desk.hub.subscribe(job_id) as first, desk.hub.subscribe("job_x") as other:
        async with desk.hub.subscribe(job_id) as second:
            await desk.emit(job_id, "a")
            assert await first.next(10) == await second.next(10)
        await desk.emit(job_id, "b")
        last = await first.next(10)
        assert isinstance(last, Event)
        assert last.text == "b"
        assert await other.next(0.01) is None


async def test_leaving_and_coming_back_at_once(desk: Desk) -> None:
    job_id = await desk.start_job()
    for n in range(20):
        async with desk.hub.subscribe(job_id) as events:
            await desk.emit(job_id, str(n))
            heard = await events.next(10)
            assert isinstance(heard, Event)
            assert heard.text == str(n)


async def test_a_slow_reader_is_told_to_read_again(desk: Desk) -> None:
    job_id = await desk.start_job()
    async with desk.hub.subscribe(job_id) as slow, desk.hub.subscribe(job_id) as quick:
        for n in range(QUEUE_EVENTS + 1):
            await desk.emit(job_id, str(n))
            assert isinstance(await quick.next(10), Event)
        assert isinstance(await slow.next(10), Resync)
        await desk.emit(job_id, "after")
        heard = await slow.next(10)
        assert isinstance(heard, Event)
        assert heard.text == "after"


async def test_many_subscriptions_use_one_connection(broker_url: str) -> None:
    async with redis_desk(broker_url) as desk:
        subscriptions = [desk.hub.subscribe(f"job_{n}") for n in range(200)]
        await asyncio.gather(*(each.__aenter__() for each in subscriptions))
        with redis.Redis.from_url(broker_url) as client:
            assert len(client.client_list(_type="pubsub")) == 1
            assert client.execute_command("PUBSUB", "NUMSUB", keys.channel("job_7"))[1] == 1
        for each in subscriptions:
            await each.__aexit__(None, None, None)


async def test_nothing_stays_subscribed(broker_url: str) -> None:
    async with redis_desk(broker_url) as desk:
        async with desk.hub.subscribe("job_1"):
            pass
        # Answers come in order, so that this confirmation comes after the other's end.
        async with desk.hub.subscribe("job_2"):
            with redis.Redis.from_url(broker_url) as client:
                channels = client.pubsub_channels("fb:ev:*")
        assert channels == [keys.channel("job_2").encode()]


async def test_a_broken_connection_is_mended_and_its_readers_told(broker_url: str) -> None:
    async with redis_desk(broker_url) as desk:
        job_id = await desk.start_job()
        async with desk.hub.subscribe(job_id) as events:
            for text in ("a", "b"):
                with redis.Redis.from_url(broker_url) as client:
                    client.client_kill_filter(_type="pubsub")
                assert isinstance(await events.next(10), Resync)
                await desk.emit(job_id, text)
                heard = await events.next(10)
                assert isinstance(heard, Event)
                assert heard.text == text


async def test_a_message_that_is_no_event_is_passed_over(valkey: str) -> None:
    async with redis_desk(valkey) as desk:
        job_id = await desk.start_job()
        async with desk.hub.subscribe(job_id) as events:
            with redis.Redis.from_url(valkey) as client:
                client.publish(keys.channel(job_id), b"{not json")
                client.publish(keys.channel(job_id), b'{"seq":1}')
                client.publish(keys.channel(job_id), b"[]")
            await desk.emit(job_id, "a")
            heard = await events.next(10)
            assert isinstance(heard, Event)
            assert heard.text == "a"


@contextmanager
def _server(binary: str, port: int, folder: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


@asynccontextmanager
async def _hub(url: str) -> AsyncIterator[tuple[EventHub, redis.asyncio.Redis]]:
    client = connect_async(RedisSettings(url=url))
    hub = EventHub(client)
    await hub.start()
    try:
        yield hub, client
    finally:
        await hub.stop()
        await client.aclose()


async def _subscribed(hub: EventHub, job_id: str) -> Subscription:
    """A subscription to a server that is about to come."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await hub.subscribe(job_id).__aenter__()
            except BrokerUnavailableError:
                continue


async def test_nobody_waits_for_a_server_that_isn_t_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "CONFIRM_TIMEOUT_S", 600)
    monkeypatch.setattr(results, "DOWN_CONFIRM_TIMEOUT_S", 600)
    async with _hub(f"redis://127.0.0.1:{free_port()}/0") as (hub, _):
        for _ in range(3):
            # Each tries again: the server may be back.
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(BrokerUnavailableError):
                    await hub.subscribe("job_1").__aenter__()


async def test_a_server_that_swallows_connections_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "CONFIRM_TIMEOUT_S", 0.5)
    monkeypatch.setattr(results, "DOWN_CONFIRM_TIMEOUT_S", 0.05)
    # Its backlog takes connections that nobody ever serves.
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        client = connect_async(RedisSettings(url=url, timeout_s=0.2))
        hub = EventHub(client)
        await hub.start()
        with pytest.raises(BrokerUnavailableError):
            await hub.subscribe("job_1").__aenter__()
        waits_s = []
        for _ in range(5):
            began = asyncio.get_running_loop().time()
            with pytest.raises(BrokerUnavailableError):
                await hub.subscribe("job_1").__aenter__()
            waits_s.append(asyncio.get_running_loop().time() - began)
        assert min(waits_s) < 0.5
        await hub.stop()
        await client.aclose()


async def test_an_absence_leaves_nothing_to_be_said() -> None:
    async with _hub(f"redis://127.0.0.1:{free_port()}/0") as (hub, _):
        tracemalloc.start()
        for n in range(3000):
            subscription = hub.subscribe(f"job_{n}")
            entering = asyncio.create_task(subscription.__aenter__())
            await asyncio.sleep(0)
            entering.cancel()
            await asyncio.wait([entering])
            if n == 500:
                gc.collect()  # cycles of the cancelled waits are no growth
                before, _ = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 100_000


async def test_a_hub_outlives_its_server(valkey_binary: str, tmp_path: Path) -> None:
    port = free_port()
    client = connect_async(RedisSettings(url=f"redis://127.0.0.1:{port}/0"))
    hub = EventHub(client)
    await hub.start()
    with pytest.raises(BrokerUnavailableError):
        await hub.subscribe("job_1").__aenter__()
    with _server(valkey_binary, port, tmp_path):
        events = await _subscribed(hub, "job_1")
    assert await events.next(0.05) is None
    with _server(valkey_binary, port, tmp_path):
        assert isinstance(await events.next(20), Resync)
        await client.publish(keys.channel("job_1"), b'{"seq":7,"type":"job.completed","attempt":1}')
        assert await events.next(10) == Event(seq=7, type=EventType.COMPLETED, attempt=1)
        await events.__aexit__(None, None, None)
        await hub.stop()
        await client.aclose()


async def test_a_job_with_the_hubs_mark_is_heard_without_a_subscription(valkey: str) -> None:
    async with _hub(valkey) as (hub, client):
        async with asyncio.timeout(5):
            await hub.subscribe(hub.new_job_id()).__aenter__()  # the hub has connected
        job_id = hub.new_job_id()
        said = await client.info("commandstats")
        async with hub.subscribe(job_id) as events:
            message = b'{"seq":2,"type":"job.in_progress","attempt":1}'
            await client.publish(keys.channel(job_id), message)
            assert await events.next(5) == Event(seq=2, type=EventType.IN_PROGRESS, attempt=1)
        stats = await client.info("commandstats")
        for name in ("cmdstat_subscribe", "cmdstat_unsubscribe"):
            assert stats.get(name) == said.get(name)


async def test_a_marked_job_is_told_of_a_lost_connection(valkey: str) -> None:
    async with _hub(valkey) as (hub, client), hub.subscribe(hub.new_job_id()) as events:
        await client.client_kill_filter(_type="pubsub")
        assert isinstance(await events.next(10), Resync)
        message = b'{"seq":3,"type":"job.completed","attempt":1}'
        await client.publish(keys.channel(events.job_id), message)
        assert await events.next(5) == Event(seq=3, type=EventType.COMPLETED, attempt=1)


async def test_ids_with_a_mark_are_ids_like_others() -> None:
    first, second = EventHub(redis.asyncio.Redis()), EventHub(redis.asyncio.Redis())
    ids = [first.new_job_id() for _ in range(200)]
    assert len(set(ids)) == 200
    assert all(len(job_id) == len(new_job_id()) for job_id in ids)
    assert {job_id[MARK] for job_id in ids} != {second.new_job_id()[MARK]}
