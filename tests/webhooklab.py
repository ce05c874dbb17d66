"""A receiver of webhooks on the loopback, and a courier to try against it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from aiohttp import web
from prometheus_client import CollectorRegistry

from broker import keys
from broker.connections import connect_async
from broker.webhooks.deliveries import Delivery, NewDelivery
from broker.webhooks.endpoints import Endpoint
from broker.webhooks.store import WebhookStore
from config.settings import Redis, Webhooks
from tests.conftest import PATIENCE_S
from workers.webhooks.courier import Courier
from workers.webhooks.guard import Lookup
from workers.webhooks.metrics import WebhookMetrics
from workers.webhooks.sender import Sender

KEY = b"k" * 32


@dataclass
class Received:
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers 204, or what `answers` has for the path: a status, or a handler of its own."""

    url: str = ""
    got: list[Received] = field(default_factory=list)
    answers: dict[str, int | Callable[[web.Request], Awaitable[web.StreamResponse]]] = field(
        default_factory=dict
    )
    headers: dict[str, str] = field(default_factory=dict)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.got.append(Received(request.path, dict(request.headers), body))
        answer = self.answers.get(request.path, 204)
        if not isinstance(answer, int):
            return await answer(request)
        return web.Response(status=answer, headers=self.headers)


@asynccontextmanager
async def receiving(host: str = "127.0.0.1") -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    port = runner.addresses[0][1]
    receiver.url = f"http://{host}:{port}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


class Clock:
    """Unix seconds that go on when told to."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@dataclass
class Lab:
    """A courier whose dispatched deliveries are kept until they are attempted."""

    client: redis.asyncio.Redis
    store: WebhookStore
    courier: Courier
    settings: Webhooks
    clock: Clock
    dispatched: list[tuple[str, int]] = field(default_factory=list)

    async def publish(self, tenant: str, *endpoints: Endpoint) -> None:
        for each in endpoints:
            await self.client.hset(keys.webhook_endpoints(tenant), each.id, each.to_json())

    async def put(self, url: str, *, event: str = "evt_1", **fields: Any) -> NewDelivery:
        made = NewDelivery(
            **{
                "tenant": "acme",
                "url": url,
                "event_id": event,
                "event_type": "job.completed",
                "body": b'{"type":"job.completed"}',
                **fields,
            }
        )
        assert await self.store.put([], [made]) == 1
        return made

    async def attempt(self) -> list[str]:
        """Claim what is due and make these attempts, all at once; how they ended."""
        # Each turn takes one of each group.
        while await self.courier.turn() == 0:
            pass
        batch, self.dispatched[:] = list(self.dispatched), []
        return list(await asyncio.gather(*(self.courier.deliver(*each) for each in batch)))

    async def pass_time(self, seconds: float) -> None:
        """All that is planned is nearer by so much."""
        self.clock.now += seconds
        for key in [keys.WEBHOOK_RING, keys.WEBHOOK_LEASES]:
            await self._nearer(key, seconds)
        async for key in self.client.scan_iter(keys.webhook_due("*")):
            await self._nearer(key, seconds)
        async for key in self.client.scan_iter(keys.webhook_health("*")):
            for name, value in (await self.client.hgetall(key)).items():
                if name != b"reason":
                    await self.client.hset(key, name, int(float(value) - seconds * 1000))

    async def _nearer(self, key: Any, seconds: float) -> None:
        for member, score in await self.client.zrange(key, 0, -1, withscores=True):
            await self.client.zadd(key, {member: score - seconds * 1000})

    async def seen(self, made: NewDelivery) -> Delivery:
        found = await self.store.delivery(made.id, made.tenant)
        assert found is not None
        return found

    async def wait_s(self, made: NewDelivery) -> float:
        """Until the next attempt."""
        due = await self.client.zscore(keys.webhook_due(made.group), made.id)
        assert due is not None
        seconds, micros = await self.client.time()
        return float(due) / 1000 - seconds - micros / 1e6


@asynccontextmanager
async def lab(
    url: str, *, lookup: Lookup | None = None, loopback: bool = True, **fields: Any
) -> AsyncIterator[Lab]:
    """On an empty Redis; development settings, loopback open."""
    settings = Webhooks(**{"timeout_s": PATIENCE_S, **fields})
    dispatched: list[tuple[str, int]] = []

    async def dispatch(delivery_id: str, attempt: int) -> None:
        dispatched.append((delivery_id, attempt))

    clock = Clock()
    sender = Sender(timeout_s=settings.timeout_s, plain=True, loopback=loopback, lookup=lookup)
    async with connect_async(Redis(url=url)) as client, sender:
        courier = Courier(
            client,
            settings,
            sender,
            key=KEY,
            dispatch=dispatch,
            metrics=WebhookMetrics(CollectorRegistry()),
            clock=clock,
        )
        store = WebhookStore(client, settings)
        yield Lab(client, store, courier, settings, clock, dispatched)
