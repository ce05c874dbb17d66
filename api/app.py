"""The composition root: settings in, resources, middleware, routes last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Final

from aiohttp import hdrs, web

from api import keys
from api.accounts.directory import open_directory
from api.accounts.webhook_service import WebhookService, open_webhooks
from api.auth.authenticator import Authenticator
from api.auth.failures import Failures
from api.batches.runner import open_storage
from api.delivery.background import Background
from api.delivery.closing import Closing
from api.delivery.sweeping import sweep_forever
from api.handlers import operations
from api.metrics import Metrics
from api.middlewares import cors
from api.middlewares.guard import make_guard
from api.ports import Authenticator as AuthenticatorPort
from api.ports import Conversations, Hub, Queue
from api.protocol_log import LOGGER
from api.routes import PUBLIC, Route, add_routes
from broker.async_queue import AsyncRedisQueue
from broker.connections import connect_async
from broker.conversations import RedisConversations
from broker.results import EventHub
from config.catalogue import ModelSpec
from config.settings import Settings

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def make_app(
    settings: Settings,
    catalogue: Mapping[str, ModelSpec],
    *,
    queue: Queue | None = None,
    hub: Hub | None = None,
    authenticator: AuthenticatorPort | None = None,
    conversations: Conversations | None = None,
    storage: bool | None = None,
    webhooks: WebhookService | None = None,
) -> web.Application:
    """The API. Tests bring their own queue, hub and authenticator; what is None is made here.

    Files and batches are there where accounts are, or where `storage` says so; webhook endpoints
    come with the accounts.
    """
    app = web.Application(
        client_max_size=settings.api.max_body_bytes,
        handler_args={
            # A caller that leaves ends its handler, which then cancels its job.
            "handler_cancellation": True,
            # Compressed bodies are refused, so nothing is to be unpacked.
            "auto_decompress": False,
            "lingering_time": 5.0,
            "keepalive_timeout": settings.api.keepalive_timeout_s,
            "access_log": None,
            "logger": LOGGER,
        },
    )
    app[keys.SETTINGS] = settings
    app[keys.CATALOGUE] = catalogue
    app[keys.METRICS] = Metrics()
    app[keys.CLOSING] = Closing()
    app[keys.BACKGROUND] = Background()
    app[keys.LOGIN_FAILURES] = Failures(settings.auth.failures_per_minute)
    if None in (queue, hub, authenticator, conversations):
        app.cleanup_ctx.append(_redis)
    if queue is None or hub is None:
        app.cleanup_ctx.append(_broker)
    else:
        app[keys.QUEUE], app[keys.HUB] = queue, hub
    if conversations is None:
        app.cleanup_ctx.append(_conversations)
    else:
        app[keys.CONVERSATIONS] = conversations
    if webhooks is not None:
        app[keys.WEBHOOKS] = webhooks
    elif authenticator is None:
        app.cleanup_ctx.append(_webhooks)
    if authenticator is None:
        app.cleanup_ctx.append(_accounts)
    else:
        app[keys.ACCOUNTS_READY], app[keys.AUTHENTICATOR] = lambda: True, authenticator
    if authenticator is None if storage is None else storage:
        app.cleanup_ctx.append(_storage)
    app.cleanup_ctx.append(_background)
    app.on_shutdown.append(_begin_closing)
    if settings.api.origins:
        cors.install(app, settings.api.origins)
    app.middlewares.append(make_guard(add_routes(app.router)))
    return app


def make_metrics_app(app: web.Application) -> web.Application:
    """The scraper's own listener beside a started `app`: open on loopback, else for admins."""
    host = app[keys.SETTINGS].api.metrics_host
    scope = PUBLIC if host in _LOOPBACK else "admin"
    metrics_app = web.Application(handler_args={"access_log": None, "logger": LOGGER})
    metrics_app[keys.CATALOGUE] = app[keys.CATALOGUE]
    metrics_app[keys.METRICS] = app[keys.METRICS]
    metrics_app[keys.LOGIN_FAILURES] = app[keys.LOGIN_FAILURES]
    metrics_app[keys.QUEUE] = app[keys.QUEUE]
    metrics_app[keys.AUTHENTICATOR] = app[keys.AUTHENTICATOR]
    table = (Route(hdrs.METH_GET, "/metrics", operations.metrics, scope),)
    metrics_app.middlewares.append(make_guard(add_routes(metrics_app.router, table)))
    return metrics_app


async def _redis(app: web.Application) -> AsyncIterator[None]:
    async with connect_async(app[keys.SETTINGS].redis) as client:
        app[keys.REDIS] = client
        yield


async def _broker(app: web.Application) -> AsyncIterator[None]:
    app[keys.QUEUE] = queue = AsyncRedisQueue(app[keys.REDIS], app[keys.SETTINGS].queue)
    hub = EventHub(app[keys.REDIS])
    await hub.start()
    app[keys.HUB] = hub
    sweeping = asyncio.create_task(sweep_forever(queue))
    yield
    sweeping.cancel()
    with suppress(asyncio.CancelledError):
        await sweeping
    await hub.stop()


async def _conversations(app: web.Application) -> AsyncIterator[None]:
    settings = app[keys.SETTINGS].api
    app[keys.CONVERSATIONS] = RedisConversations(
        app[keys.REDIS], ttl_s=settings.conversation_ttl_s, most=settings.max_conversations
    )
    yield


async def _accounts(app: web.Application) -> AsyncIterator[None]:
    settings, client = app[keys.SETTINGS], app[keys.REDIS]
    set_policy = AsyncRedisQueue(client, settings.queue).set_policy
    async with open_directory(settings, client=client, set_policy=set_policy) as directory:
        app[keys.ACCOUNTS_READY] = lambda: directory.ready
        app[keys.AUTHENTICATOR] = Authenticator.from_settings(settings, directory)
        yield


async def _storage(app: web.Application) -> AsyncIterator[None]:
    async with open_storage(
        app[keys.SETTINGS], app[keys.CATALOGUE], app[keys.QUEUE], app[keys.HUB], app[keys.METRICS]
    ) as (app[keys.LIBRARY], app[keys.BATCHES]):
        yield


async def _webhooks(app: web.Application) -> AsyncIterator[None]:
    async with open_webhooks(app[keys.SETTINGS], client=app[keys.REDIS]) as service:
        app[keys.WEBHOOKS] = service
        yield


async def _background(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[keys.BACKGROUND].drain(timeout_s=2.0)


async def _begin_closing(app: web.Application) -> None:
    app[keys.CLOSING].begin()
