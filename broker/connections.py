"""Connections to Redis: how they are made, what a server must be, what its errors mean."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from broker import keys
from broker.errors import BrokerError, BrokerUnavailableError, SchemaVersionError
from broker.sentinel import (
    AsyncPrimaryConnection,
    AsyncPrimarySSLConnection,
    Primary,
    PrimaryConnection,
    PrimarySSLConnection,
)
from config.logs import get_logger
from config.sentinel import SentinelUrl
from config.settings import Redis as RedisSettings

log = get_logger(__name__)

#: Layout of the keys. Processes of one major version work side by side; another major version
#: needs an empty Redis, or a migration with all processes stopped.
SCHEMA_VERSION = "1.0"

#: Oldest command set the scripts are written for.
MIN_VERSION = (7, 0)

#: A connection that was idle for this long is probed before it is used.
_HEALTH_CHECK_S = 30


def connect(settings: RedisSettings) -> redis.Redis:
    """A thread-safe client; nothing is sent yet.

    It retries nothing: the queue knows which of its calls may be repeated.
    """
    options = _options(settings) | {"retry": Retry(NoBackoff(), 0)}
    kind: Any = redis.BlockingConnectionPool  # untyped
    if (primary := primary_of(settings)) is None:
        pool = kind.from_url(settings.url.get_secret_value(), **options)
    else:
        secure = primary.url.tls
        pool = kind(
            connection_class=PrimarySSLConnection if secure else PrimaryConnection,
            **options,
            **primary.options,
        )
    return redis.Redis.from_pool(pool)


def connect_async(settings: RedisSettings) -> redis.asyncio.Redis:
    """The same for one event loop."""
    options = _options(settings) | {"retry": AsyncRetry(NoBackoff(), 0)}
    kind: Any = redis.asyncio.BlockingConnectionPool
    if (primary := primary_of(settings)) is None:
        pool = kind.from_url(settings.url.get_secret_value(), **options)
    else:
        secure = primary.url.tls
        pool = kind(
            connection_class=AsyncPrimarySSLConnection if secure else AsyncPrimaryConnection,
            **options,
            **primary.options,
        )
    return redis.asyncio.Redis.from_pool(pool)


def primary_of(settings: RedisSettings) -> Primary | None:
    """How the primary is found, where Sentinels watch over it."""
    url = settings.url.get_secret_value()
    if not SentinelUrl.matches(url):
        return None
    return Primary(SentinelUrl.parse(url), settings.timeout_s)


def _options(settings: RedisSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_connections": settings.max_connections,
        "timeout": settings.timeout_s,
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "health_check_interval": _HEALTH_CHECK_S,
        "client_name": "forebay",
    }
    if not settings.url.get_secret_value().startswith("unix://"):
        options["socket_keepalive"] = True
    return options


def check_server(client: redis.Redis) -> None:
    """Refuse a server the scripts can't work on; warn of one that may lose jobs.

    The first process on an empty server writes down its schema version. Raises `BrokerError` naming
    what is wrong (`SchemaVersionError`: written by another major version), or
    `BrokerUnavailableError`.
    """
    try:
        info: dict[str, Any] = client.info()
        policy = str(info.get("maxmemory_policy", "noeviction"))
    except (RedisError, OSError) as error:
        raise translate(error) from error
    if int(info.get("cluster_enabled", 0)):
        raise BrokerError("Redis Cluster is not supported: use one primary per cell")
    # Valkey tells the Redis version it is compatible with.
    name = str(info.get("server_name", "redis"))
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        raise BrokerError(f"{name} {version} is too old: 7.0 or newer is needed")
    if info.get("role", "master") != "master":
        raise BrokerError("this Redis is a replica: give the address of the primary")
    _check_schema(client)
    if policy != "noeviction":
        log.warning("redis_may_evict_jobs", maxmemory_policy=policy, wanted="noeviction")


def _check_schema(client: redis.Redis) -> None:
    try:
        client.set(keys.SCHEMA, SCHEMA_VERSION, nx=True)
        found = client.get(keys.SCHEMA)
    except (RedisError, OSError) as error:
        raise translate(error) from error
    text = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
    if text.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise SchemaVersionError(
            f"the data in this Redis has schema version {text}; this version of Forebay works on "
            f"{SCHEMA_VERSION}. Use the version that wrote it, or another Redis database."
        )


def translate(error: Exception) -> BrokerError:
    """What an error of redis-py means: almost always that the broker isn't available now."""
    if isinstance(error, BrokerError):
        return error
    text = str(error)
    if isinstance(error, MaxConnectionsError) or text == "No connection available.":
        return BrokerUnavailableError("all connections to Redis are in use")
    if isinstance(error, AuthenticationError):
        return BrokerUnavailableError("Redis refused the credentials")
    if isinstance(error, BusyLoadingError) or text.startswith("LOADING"):
        return BrokerUnavailableError("Redis is loading its data")
    if isinstance(error, ReadOnlyError) or text.startswith("READONLY"):
        return BrokerUnavailableError("Redis is read-only")
    if isinstance(error, OutOfMemoryError) or text.startswith("OOM"):
        return BrokerUnavailableError("Redis is out of memory")
    if isinstance(error, ResponseError):
        if text.startswith(
            ("MISCONF", "NOREPLICAS", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH")
        ):
            return BrokerUnavailableError(f"Redis refuses commands ({text.split(' ', 1)[0]})")
        return BrokerError(f"Redis refused a command: {text}")
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return BrokerUnavailableError("Redis did not answer in time")
    return BrokerUnavailableError("Redis can't be reached")
