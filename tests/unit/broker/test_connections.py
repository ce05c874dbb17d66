"""What a server must be, and what errors mean."""

from __future__ import annotations

from typing import Any, cast

import pytest
import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from broker import keys
from broker.connections import SCHEMA_VERSION, check_server, connect, connect_async, translate
from broker.errors import BrokerError, BrokerUnavailableError, SchemaVersionError
from config.settings import Redis

FIT = {
    "redis_version": "7.2.4",
    "server_name": "valkey",
    "cluster_enabled": 0,
    "role": "master",
    "maxmemory_policy": "noeviction",
}


class _Server:
    def __init__(self, schema: bytes | None = None, **info: Any) -> None:
        self._info = FIT | info
        self.schema = schema

    def info(self) -> dict[str, Any]:
        return self._info

    def set(self, key: str, value: str, *, nx: bool) -> None:
        assert (key, nx) == (keys.SCHEMA, True)
        if self.schema is None:
            self.schema = value.encode()

    def get(self, key: str) -> bytes | None:
        return self.schema


def _check(**info: Any) -> None:
    check_server(cast(redis.Redis, _Server(**info)))


def test_a_fit_server() -> None:
    _check()
    _check(redis_version="8.0.0", server_name="redis")


def test_the_first_process_writes_its_schema_version_down() -> None:
    server = _Server()
    check_server(cast(redis.Redis, server))
    assert server.schema == SCHEMA_VERSION.encode()
    check_server(cast(redis.Redis, server))


@pytest.mark.parametrize("found", [b"0.9", b"2.0", b"10.0", b"what"])
def test_data_of_another_major_version_is_refused(found: bytes) -> None:
    with pytest.raises(SchemaVersionError, match=f"schema version {found.decode()};"):
        _check(schema=found)


def test_data_of_another_minor_version_is_fine() -> None:
    _check(schema=SCHEMA_VERSION.split(".")[0].encode() + b".99")


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"cluster_enabled": 1}, "Cluster"),
        ({"redis_version": "6.2.14", "server_name": "redis"}, "redis 6.2.14 is too old"),
        ({"role": "slave"}, "replica"),
    ],
)
def test_an_unfit_server(info: dict[str, Any], reason: str) -> None:
    with pytest.raises(BrokerError, match=reason) as refused:
        _check(**info)
    assert not isinstance(refused.value, BrokerUnavailableError)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (redis.ConnectionError("Error 111 connecting"), "can't be reached"),
        (OSError("broken"), "can't be reached"),
        (redis.TimeoutError("x"), "did not answer in time"),
        (TimeoutError(), "did not answer in time"),
        (BusyLoadingError("x"), "loading"),
        (ReadOnlyError("You can't write"), "read-only"),
        (OutOfMemoryError("x"), "out of memory"),
        (AuthenticationError("x"), "credentials"),
        (MaxConnectionsError("x"), "in use"),
        (redis.ConnectionError("No connection available."), "in use"),
        (ResponseError("MISCONF Redis is configured to save"), "MISCONF"),
        (ResponseError("BUSY Redis is busy running a script"), "BUSY"),
    ],
)
def test_trouble_that_passes(error: Exception, reason: str) -> None:
    meant = translate(error)
    assert isinstance(meant, BrokerUnavailableError)
    assert reason in str(meant)


def test_trouble_that_does_not_pass() -> None:
    meant = translate(ResponseError("ERR bad band, cost or delay"))
    assert not isinstance(meant, BrokerUnavailableError)
    assert "bad band" in str(meant)
    assert translate(meant) is meant


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://:secret@127.0.0.1:6399/2", "Connection"),
        ("rediss://127.0.0.1:6399/0", "SSLConnection"),
        ("unix:///tmp/none.sock", "UnixDomainSocketConnection"),
    ],
)
def test_kinds_of_addresses(url: str, kind: str) -> None:
    settings = Redis(url=url, timeout_s=1.5, max_connections=3)
    for client in (connect(settings), connect_async(settings)):
        pool = client.connection_pool
        assert pool.connection_class.__name__ == kind
        assert pool.max_connections == 3
        connection = pool.make_connection()
        assert connection.socket_timeout == connection.socket_connect_timeout == 1.5
        assert connection.retry.get_retries() == 0
