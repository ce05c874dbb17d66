"""Typed keys of what the application and a request carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import redis.asyncio
from aiohttp import web

from api.accounts.webhook_service import WebhookService
from api.auth.failures import Failures
from api.auth.principal import Principal
from api.delivery.background import Background
from api.delivery.closing import Closing
from api.files.library import Library
from api.metrics import Metrics
from api.ports import Authenticator, Conversations, Hub, Queue
from config.catalogue import ModelSpec
from config.settings import Settings

if TYPE_CHECKING:
    from api.batches.runner import BatchRunner

SETTINGS: Final = web.AppKey("settings", Settings)
CATALOGUE: Final[web.AppKey[Mapping[str, ModelSpec]]] = web.AppKey("catalogue")
REDIS: Final = web.AppKey("redis", redis.asyncio.Redis)
QUEUE: Final[web.AppKey[Queue]] = web.AppKey("queue")
HUB: Final[web.AppKey[Hub]] = web.AppKey("hub")
#: Whether accounts were loaded.
ACCOUNTS_READY: Final[web.AppKey[Callable[[], bool]]] = web.AppKey("accounts_ready")
AUTHENTICATOR: Final[web.AppKey[Authenticator]] = web.AppKey("authenticator")
LOGIN_FAILURES: Final = web.AppKey("login_failures", Failures)
BACKGROUND: Final = web.AppKey("background", Background)
CONVERSATIONS: Final[web.AppKey[Conversations]] = web.AppKey("conversations")
CLOSING: Final = web.AppKey("closing", Closing)
#: Absent in an application that was made without storage.
LIBRARY: Final = web.AppKey("library", Library)
BATCHES: Final[web.AppKey[BatchRunner]] = web.AppKey("batches")
#: Absent where a test brings its own accounts and none of these.
WEBHOOKS: Final = web.AppKey("webhooks", WebhookService)
METRICS: Final = web.AppKey("metrics", Metrics)

PRINCIPAL: Final = web.RequestKey("principal", Principal)
REQUEST_ID: Final = web.RequestKey("request_id", str)
