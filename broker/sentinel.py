"""Connections that ask Sentinel where the primary is, each time they connect.

One that breaks because the primary is gone finds the new one by connecting again; nothing else in
Forebay knows of Sentinel. After connecting, ROLE is asked, as Redis's guidelines for clients want:
a Sentinel that hasn't heard of a failover yet must not lead anybody to a former primary.
(https://redis.io/docs/latest/develop/reference/sentinel-clients/)
"""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from config.sentinel import SentinelUrl

#: Longest a Sentinel may take before the next one is asked (s).
ASK_TIMEOUT_S = 1.0


class Primary:
    """Finds the primary of one service. Shared by threads and event loops."""

    def __init__(self, url: SentinelUrl, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = min(timeout_s, ASK_TIMEOUT_S)
        #: The one that answered last is asked first.
        self._sentinels = list(url.sentinels)

    def __repr__(self) -> str:
        return f"Primary({self.url!r})"

    @property
    def options(self) -> dict[str, Any]:
        """How a connection to the primary is made, beside what all connections have."""
        return {
            "primary": self,
            "db": self.url.db,
            "username": self.url.username,
            "password": self.url.password,
            **self._tls,
        }

    @property
    def _tls(self) -> dict[str, Any]:
        return {"ssl_ca_certs": self.url.ca_certs} if self.url.tls else {}

    def find(self) -> tuple[str, int]:
        """Host and port; redis-py's `ConnectionError` when no Sentinel can tell."""
        for sentinel in tuple(self._sentinels):
            connection = self._connection(sentinel, redis.SSLConnection, redis.Connection)
            try:
                connection.connect()
                connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.url.service)
                reply = connection.read_response()
            except (RedisError, OSError):
                continue
            finally:
                connection.disconnect()
            if reply:
                return self._found(sentinel, reply)
        raise self._unknown()

    async def find_async(self) -> tuple[str, int]:
        """`find` for an event loop."""
        for sentinel in tuple(self._sentinels):
            connection = self._connection(sentinel, AsyncSSLConnection, redis.asyncio.Connection)
            try:
                await connection.connect()
                await connection.send_command(
                    "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.url.service
                )
                reply = await connection.read_response()
            except (RedisError, OSError):
                continue
            finally:
                await connection.disconnect(nowait=True)
            if reply:
                return self._found(sentinel, reply)
        raise self._unknown()

    def _connection(self, sentinel: tuple[str, int], secure: Any, plain: Any) -> Any:
        return (secure if self.url.tls else plain)(
            host=sentinel[0],
            port=sentinel[1],
            username=self.url.sentinel_username,
            password=self.url.sentinel_password,
            protocol=2,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            **self._tls,
        )

    def _found(self, sentinel: tuple[str, int], reply: list[bytes]) -> tuple[str, int]:
        if self._sentinels[0] != sentinel:
            self._sentinels = [sentinel, *(x for x in self.url.sentinels if x != sentinel)]
        return reply[0].decode(), int(reply[1])

    def _unknown(self) -> RedisConnectionError:
        return RedisConnectionError(f"no Sentinel knows a primary named {self.url.service!r}")


def _require_primary(reply: Any) -> None:
    if reply[0] != b"master":
        raise RedisConnectionError("the server that Sentinel named is not a primary")


class _ToPrimary:
    """What makes a connection of redis-py one to the primary."""

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        super().__init__(**options)
        self._primary = primary

    def _connect(self) -> Any:
        self.host, self.port = self._primary.find()
        return super()._connect()  # type: ignore[misc]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        self.send_command("ROLE", check_health=False)  # type: ignore[attr-defined]
        _require_primary(self.read_response())  # type: ignore[attr-defined]


class _ToPrimaryAsync:
    """The same for an event loop."""

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        super().__init__(**options)
        self._primary = primary

    async def _connect(self) -> None:
        self.host, self.port = await self._primary.find_async()
        await super()._connect()  # type: ignore[misc]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        await self.send_command("ROLE", check_health=False)  # type: ignore[attr-defined]
        _require_primary(await self.read_response())  # type: ignore[attr-defined]


class PrimaryConnection(_ToPrimary, redis.Connection):
    pass


class PrimarySSLConnection(_ToPrimary, redis.SSLConnection):
    pass


class AsyncPrimaryConnection(_ToPrimaryAsync, redis.asyncio.Connection):
    pass


class AsyncPrimarySSLConnection(_ToPrimaryAsync, AsyncSSLConnection):
    pass
