"""The Celery application on our transport, for workers and for the Flower console.

Start-up order of a worker process: make the app, install and start a `leases.LeaseRegistry` for
the model's queue, then run the Celery worker with that one queue. The signals connected here do
the rest: a shutdown drains the registry, and the end of the worker stops it.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import celery
from celery import signals
from kombu import Exchange, Queue, transport

from broker import leases, tickets
from broker.connections import primary_of
from config.sentinel import SentinelUrl
from config.settings import Settings

#: Celery's own log lines per job; the worker's say the same, with tenant and attempt.
_CHATTY = (
    "celery.worker.strategy",
    "celery.app.trace",
    # Says at each attempt that it has connected.
    "celery.worker.consumer.connection",
)

#: How often the connections of the event loop are probed (s).
HEALTH_CHECK_S = 5


class JobTask(celery.Task):  # type: ignore[misc]
    """Base of `forebay.run_job`: leases, not Celery, decide about acknowledgement and stopping."""

    abstract = True
    acks_late = True
    ignore_result = True
    max_retries = 0
    #: Resolved by Celery in worker processes only.
    Request = "workers.requests:JobRequest"


def make_app(
    settings: Settings, *, model_queues: Iterable[str], owner: str | None = None
) -> celery.Celery:
    """A Celery app whose `redis://` is our transport, with one queue per model.

    The change of transport is made for the whole process. With `queue.broker_url` set, the app is
    on RabbitMQ, and its queues carry tickets; a worker (`owner`) has one of its own as well.
    """
    use_transport()
    app = celery.Celery("forebay", task_cls=JobTask)
    app.conf.update(configuration(settings, frozenset(model_queues), owner))
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    signals.worker_shutting_down.connect(_drain, weak=False, dispatch_uid="forebay-drain")
    signals.worker_shutdown.connect(_stop, weak=False, dispatch_uid="forebay-stop")
    return app


def use_transport() -> None:
    """Put `broker.transport` behind kombu's `redis://` and `rediss://`.

    Flower's broker page goes by these schemes, so an alias of our own would not do.
    """
    for scheme in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[scheme] = "broker.transport:Transport"
        transport._transport_cache.pop(scheme, None)


def configuration(
    settings: Settings, model_queues: frozenset[str], owner: str | None = None
) -> dict[str, Any]:
    if settings.queue.broker_url.get_secret_value():
        return _common(settings) | _over_rabbitmq(settings, model_queues, owner)
    return _common(settings) | _over_redis(settings, model_queues)


def _over_rabbitmq(
    settings: Settings, model_queues: frozenset[str], owner: str | None
) -> dict[str, Any]:
    """Workers consume tickets; see `broker.tickets`."""
    url = settings.queue.broker_url.get_secret_value()
    return {
        "broker_url": url,
        "broker_use_ssl": tickets.tls(url) or None,
        "broker_transport_options": {
            "read_timeout": tickets.TIMEOUT_S,
            "write_timeout": tickets.TIMEOUT_S,
        },
        # A connection that fell silent is dropped after twice this.
        "broker_heartbeat": HEALTH_CHECK_S,
        "task_queues": [
            queue for name in sorted(model_queues) for queue in tickets.ticket_queues(name, owner)
        ],
    }


def _over_redis(settings: Settings, model_queues: frozenset[str]) -> dict[str, Any]:
    primary = primary_of(settings.redis)
    url = settings.redis.url.get_secret_value() if primary is None else _plain_url(primary.url)
    exchange = Exchange("forebay", type="direct")
    secure = url.startswith("rediss://") and "ssl_cert_reqs" not in url
    return {
        "broker_url": broker_url(url),
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED} if secure else None,
        "broker_transport_options": {
            "model_queues": sorted(model_queues),
            "claim_batch": settings.queue.claim_batch,
            "primary": primary,
            "socket_timeout": settings.redis.timeout_s,
            "socket_connect_timeout": settings.redis.timeout_s,
            "socket_keepalive": True,
            # A connection that fell silent is dropped after twice this and a second.
            "health_check_interval": HEALTH_CHECK_S,
        },
        "task_queues": [Queue(name, exchange, routing_key=name) for name in sorted(model_queues)],
    }


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # Results are the job records.
        "result_backend": None,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        # Else each thread of the pool makes a (disabled) backend of its own with its first job, and
        # looks through the metadata of all installed packages for it: 30 ms under the GIL.
        "result_backend_thread_safe": True,
        "accept_content": ["json"],
        "task_serializer": "json",
        # A job is acknowledged when it is settled, whatever became of it.
        "task_acks_late": True,
        "task_acks_on_failure_or_timeout": True,
        "task_reject_on_worker_lost": False,
        # No job waits in a worker that could start in another. (worker_disable_prefetch, with the
        # early acknowledgement it wants, starves.)
        "worker_prefetch_multiplier": 1,
        # The registry knows the free slots, also after a reconnect; jobs run on through one.
        "worker_enable_prefetch_count_reduction": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_pool": "workers.pool:EnginePool",
        "worker_consumer": "workers.consumer:Consumer",
        "worker_send_task_events": settings.worker.task_events,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "timezone": "UTC",
    }


def broker_url(url: str) -> str:
    """kombu's spelling of a redis-py URL: `unix://path?db=1` is `redis+socket://path?…`."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    options = dict(parse_qsl(parts.query))
    if "db" in options:
        options["virtual_host"] = options.pop("db")
    user = parts.netloc
    if password := options.pop("password", None):
        user = f"{quote(options.pop('username', ''))}:{quote(password, safe='')}@"
    query = f"?{urlencode(options)}" if options else ""
    return f"redis+socket://{user}{parts.path}{query}"


def _plain_url(url: SentinelUrl) -> str:
    """Names the first Sentinel; the transport asks them where the primary is."""
    host, port = url.sentinels[0]
    scheme = "rediss" if url.tls else "redis"
    user = f"{quote(url.username or '', safe='')}:{quote(url.password or '', safe='')}@"
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{scheme}://{user if user != ':@' else ''}{where}/{url.db}"


def _drain(**_: Any) -> None:
    """Runs in a signal handler: nothing here may take a lock."""
    if (registry := leases.installed()) is not None:
        registry.drain()


def _stop(**_: Any) -> None:
    if (registry := leases.installed()) is not None:
        registry.stop()
