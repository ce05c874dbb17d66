"""Puts the webhook worker together: a loop for Redis and HTTP in a thread, Celery beside it."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import CancelledError
from typing import Any

from broker.app import make_app
from broker.connections import connect_async
from broker.webhooks import signing
from config.logs import get_logger
from config.settings import Settings
from workers.metrics_listener import serve_metrics
from workers.webhooks import tasks
from workers.webhooks.courier import Courier, drop_cancelled
from workers.webhooks.guard import Lookup
from workers.webhooks.metrics import WebhookMetrics
from workers.webhooks.sender import Sender

log = get_logger(__name__)

#: Redis connections of the process.
_CONNECTIONS = 8


class WebhookProcess:
    """One Celery worker that sends webhooks; `run` returns its exit code.

    Raises `SettingsError` when there is nothing to derive secrets from. `lookup` stands in for the
    system's resolver.
    """

    def __init__(self, settings: Settings, *, lookup: Lookup | None = None) -> None:
        self._settings = settings
        self._key = signing.installation_key(settings)
        self._lookup = lookup
        self._loop = asyncio.new_event_loop()
        self._courier: Courier | None = None
        self._started = threading.Event()
        #: Nothing more shall be claimed; nothing runs any more.
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    def run(self) -> int:
        serve_metrics(self._settings)
        thread = threading.Thread(target=self._serve, name="webhook-courier", daemon=True)
        app = self._app()
        tasks.install(self._deliver)
        thread.start()
        self._started.wait()
        try:
            self._consume(app)
        finally:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._loop.call_soon_threadsafe(self._ended.set)
            thread.join(self._settings.worker.grace_s)
        log.info("webhook_worker_stopped")
        return 0

    def _app(self) -> Any:
        from celery.signals import setup_logging, worker_shutting_down
        from kombu import Queue

        def keep_our_logging(**_: object) -> None:
            """Connected so that Celery leaves the logging of this process alone."""

        def stop_claiming(**_: object) -> None:
            self._loop.call_soon_threadsafe(self._stopping.set)

        setup_logging.connect(keep_our_logging, weak=False)
        worker_shutting_down.connect(stop_claiming, weak=False)
        app = make_app(self._settings, model_queues=[])
        app.conf.task_queues = [Queue(tasks.QUEUE, routing_key=tasks.QUEUE)]
        app.set_current()
        app.set_default()
        return app

    def _consume(self, app: Any) -> None:
        worker = app.Worker(
            hostname=f"{tasks.QUEUE}@{socket.gethostname()}",
            concurrency=self._settings.webhooks.max_in_flight,
            queues=[tasks.QUEUE],
            task_events=self._settings.worker.task_events,
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        log.info("webhook_worker_ready", concurrency=self._settings.webhooks.max_in_flight)
        worker.start()

    def _deliver(self, delivery_id: str, attempt: int) -> str:
        """Called in a thread of Celery's pool; waits for the attempt to end."""
        assert self._courier is not None
        attempted = asyncio.run_coroutine_threadsafe(
            self._courier.deliver(delivery_id, attempt), self._loop
        )
        try:
            return attempted.result()
        except CancelledError:
            return "interrupted"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._work())
        finally:
            self._started.set()
            self._loop.close()

    async def _work(self) -> None:
        settings = self._settings
        development = settings.env == "development"
        redis_settings = settings.redis.model_copy(update={"max_connections": _CONNECTIONS})
        sender = Sender(
            timeout_s=settings.webhooks.timeout_s,
            plain=development,
            loopback=development and settings.webhooks.allow_loopback,
            lookup=self._lookup,
        )
        async with connect_async(redis_settings) as client, sender:
            self._courier = Courier(
                client,
                settings.webhooks,
                sender,
                key=self._key,
                dispatch=_dispatch,
                metrics=WebhookMetrics(),
            )
            running = asyncio.create_task(self._courier.run())
            self._started.set()
            await self._stopping.wait()
            await drop_cancelled(running)
            # Attempts under way have the time that Celery's pool leaves them; what is cut off then
            # is sent again when its lease has run out.
            await self._ended.wait()
            own = asyncio.current_task()
            left = [task for task in asyncio.all_tasks() if task is not own]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


async def _dispatch(delivery_id: str, attempt: int) -> None:
    await asyncio.to_thread(
        tasks.deliver_webhook.apply_async, (delivery_id, attempt), queue=tasks.QUEUE, retry=False
    )
