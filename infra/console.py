"""`python -m infra.console`: Flower on our Celery app, with the true depth of the fair queues.

Flower's own reader counts Redis lists. Ours asks the broker: one row per model queue and, below
it, one per tenant with most jobs. Flower's operations are off (they would reach around the
broker's leases), and so is its persistence.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any

import redis.asyncio
from flower.app import Flower
from flower.options import options as flower_options
from flower.urls import settings as flower_settings
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from tornado.web import HTTPError, RequestHandler

from broker.app import make_app
from broker.connections import connect_async
from broker.errors import BrokerError
from broker.redis_queue import AsyncRedisQueue
from config import catalogue, logs
from config.logs import get_logger
from config.settings import Flower as FlowerSettings
from config.settings import Settings, SettingsError, load

log = get_logger(__name__)

#: Names of this machine; a page that comes by another name was sent by a stranger's website.
_LOCAL_NAMES = r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])"


class QueueReader:
    """What the broker page shows, in the fields of Flower's own readers."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        queue: AsyncRedisQueue,
        *,
        models: Iterable[str],
        top: int,
    ) -> None:
        self._client = client
        self._queue = queue
        self._models = frozenset(models)
        self._top = top

    async def rows(self) -> list[dict[str, Any]]:
        """Model queues by name, each followed by its tenants. Raises `BrokerError`."""
        workers = await self._queue.workers()
        rows: list[dict[str, Any]] = []
        for name in sorted(self._models | set(await self._queue.queues())):
            stats = await self._queue.stats(name, top=self._top)
            rows.append(
                {
                    "name": name,
                    # The mirror list, which every reader of list lengths sees too.
                    "messages": await self._client.llen(name),
                    "messages_ready": stats.depth,
                    "messages_unacknowledged": stats.in_flight,
                    "consumers": sum(worker.queue == name for worker in workers),
                }
            )
            rows += [
                {
                    "name": f"{name} · tenant {tenant.tenant}",
                    "messages": tenant.queued,
                    "messages_ready": tenant.queued,
                    "messages_unacknowledged": tenant.in_flight,
                }
                for tenant in stats.top_tenants
            ]
        return rows


class _BrokerPage(BrokerView):  # type: ignore[misc]
    async def get(self) -> None:
        _require_user(self)
        try:
            rows = await self.application.settings["queue_reader"].rows()
        except (BrokerError, redis.RedisError) as error:
            log.warning("queues_unreadable", error=type(error).__name__)
            rows = []
        self.render("broker.html", broker_url=self.application.broker_uri, queues=rows)


class _QueueLengths(BaseHandler):  # type: ignore[misc]
    async def get(self) -> None:
        _require_user(self)
        try:
            rows = await self.application.settings["queue_reader"].rows()
        except (BrokerError, redis.RedisError):
            raise HTTPError(503, "the broker can't be read") from None
        self.write({"active_queues": rows})


class _GuardedMetrics(Metrics):  # type: ignore[misc]
    async def get(self) -> None:
        _require_user(self)
        await super().get()


def _require_user(handler: BaseHandler) -> None:
    """Raises 401 without the password, when there is one (`get_current_user` of Flower)."""
    if not handler.current_user:
        raise HTTPError(401)


class _WrongHost(RequestHandler):  # type: ignore[misc]
    def prepare(self) -> None:
        raise HTTPError(403, "not a name of this machine")


def check(settings: Settings) -> None:
    """Raises `SettingsError` when the console would be open to others than this machine."""
    password = settings.flower.basic_auth.get_secret_value()
    if password:
        user, colon, secret = password.partition(":")
        # Flower compares text in constant time, which works for ASCII alone.
        if not (user and colon and secret and password.isascii()):
            raise SettingsError("FOREBAY_FLOWER__BASIC_AUTH=(hidden): must be user:password, ASCII")
        return
    if settings.env == "production" or not _is_loopback(settings.flower.host):
        raise SettingsError(
            f"FOREBAY_FLOWER__BASIC_AUTH=(not set): required in production and when"
            f" FOREBAY_FLOWER__HOST ({settings.flower.host!r}) is not a loopback address"
        )


def make_console(settings: Settings, models: Sequence[str], reader: QueueReader) -> Flower:
    """The Tornado application; `reader` belongs to the running event loop."""
    password = settings.flower.basic_auth.get_secret_value()
    _configure(settings.flower, password=password, events=settings.worker.task_events)
    console = Flower(
        capp=make_app(settings, model_queues=models),
        options=flower_options,
        **{**flower_settings, "queue_reader": reader, "debug": False},
    )
    if not password:
        # Without a password the loopback is the guard; a name that only resolves to it isn't.
        console.add_handlers(rf"(?!{_LOCAL_NAMES}$).*", [(r".*", _WrongHost)])
    console.add_handlers(
        r".*",
        [
            (r"/broker", _BrokerPage),
            (r"/api/queues/length", _QueueLengths),
            (r"/metrics", _GuardedMetrics),
        ],
    )
    return console


def _configure(settings: FlowerSettings, *, password: str, events: bool) -> None:
    flower_options.address = settings.host
    flower_options.port = settings.port
    flower_options.basic_auth = [password] if password else []
    flower_options.persistent = False
    flower_options.read_only = True
    flower_options.enable_events = events
    flower_options.max_tasks = 10_000
    flower_options.purge_offline_workers = 3600
    # Flower closes its JSON API when there is no password, and opens it to every website when told
    # otherwise. Here it is open to this machine only.
    os.environ["FLOWER_UNAUTHENTICATED_API"] = "false" if password else "true"
    BaseHandler.set_default_headers = _set_headers


def _set_headers(handler: RequestHandler) -> None:
    """Flower's own, without its `Access-Control-Allow-Origin: *`."""
    handler.set_header("X-Content-Type-Options", "nosniff")
    handler.set_header("X-Frame-Options", "DENY")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(settings: Settings, models: Sequence[str]) -> None:
    """Run the console until SIGTERM or SIGINT."""
    client = connect_async(settings.redis)
    reader = QueueReader(
        client,
        AsyncRedisQueue(client, settings.queue),
        models=models,
        top=settings.flower.top_tenants,
    )
    console = make_console(settings, models, reader)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    port = console.start_http_server()
    # What `Flower.start` does, but for running a loop of its own.
    console.events.start()
    console.started = True
    console.update_workers()
    log.info("console_started", host=settings.flower.host, port=port)
    await ended.wait()
    console.events.stop()
    await client.aclose()


def main() -> int:
    """Exit code: 0 told to stop, 1 the port is taken, 2 bad settings."""
    try:
        settings = load()
        check(settings)
        models = list(catalogue.load(settings.models.catalogue))
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before logs are set up
        return 2
    logs.configure(settings.log, process="flower")
    # The one warns at every look while no worker is there to answer, the other logs every page.
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    try:
        asyncio.run(serve(settings, models))
    except OSError as error:
        log.error("console_failed", error=error.strerror or str(error))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    # Flower's inspection threads may wait for a broker that is gone; nothing of them is kept.
    sys.stderr.flush()
    os._exit(status)
