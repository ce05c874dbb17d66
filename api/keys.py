"""Typed keys of what the application and a request carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import redis.asyncio
from aiohttp import web

from api.accounts.webhook_service import WebhookService
from api.auth.principal import Principal
from api.delivery.background import Background
from api.delivery.closing import Closing
from api.metrics import Metrics
from api.ports import Authenticator, Hub, Queue
from config.catalogue import ModelSpec
from config.settings import Settings

SETTINGS: Final = web.AppKey("settings", Settings)
CATALOGUE: Final[web.AppKey[Mapping[str, ModelSpec]]] = web.AppKey("catalogue")
REDIS: Final = web.AppKey("redis", redis.asyncio.Redis)
QUEUE: Final[web.AppKey[Queue]] = web.AppKey("queue")
HUB: Final[web.AppKey[Hub]] = web.AppKey("hub")
#: Whether accounts were loaded.
ACCOUNTS_READY: Final[web.AppKey[Callable[[], bool]]] = web.AppKey("accounts_ready")
AUTHENTICATOR: Final[web.AppKey[Authenticator]] = web.AppKey("authenticator")
BACKGROUND: Final = web.AppKey("background", Background)
CLOSING: Final = web.AppKey("closing", Closing)
#: Absent where a test brings its own accounts and none of these.
WEBHOOKS: Final = web.AppKey("webhooks", WebhookService)
METRICS: Final = web.AppKey("metrics", Metrics)

PRINCIPAL: Final = web.RequestKey("principal", Principal)
REQUEST_ID: Final = web.RequestKey("request_id", str)
