"""A connection to Redis whose replies are handed over as they come in.

redis-py makes the connection (address, TLS, credentials, role of the server) and closes it. In
between its streams would cost each reply several turns of the event loop, and a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError

# What turns an error reply into redis-py's class for it.
from redis._parsers.base import BaseParser  # isort: skip

_NOTHING: Final = object()


class Link(asyncio.Protocol):
    """Takes over a connection that redis-py has just made.

    `on_reply` gets each reply, an error as redis-py's exception; `on_lost` is called once, when
    the connection is gone. Nothing else may read from the connection any more.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        on_reply: Callable[[Any], None],
        on_lost: Callable[[Exception], None],
    ) -> None:
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=BaseParser.parse_error,
            notEnoughData=_NOTHING,
        )
        writer: Any = connection._writer
        self._transport: asyncio.Transport | None = writer.transport
        # It is still told what happens to the transport: whoever closes its stream waits for that.
        self._streams = cast("asyncio.Protocol", writer.transport.get_protocol())
        writer.transport.set_protocol(self)

    @property
    def open(self) -> bool:
        return self._transport is not None

    def write(self, data: bytes) -> None:
        """Send; nothing when the connection is gone."""
        if self._transport is not None:
            self._transport.write(data)

    def lose(self, error: Exception) -> None:
        """Give the connection up, now."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            self._on_lost(error)

    # -- asyncio's side ---------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOTHING:
                self._on_reply(reply)
                if self._transport is None:
                    return
        except RedisError as error:
            self.lose(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.connection_lost(exc)
        if self._transport is not None:
            self._transport = None
            self._on_lost(RedisConnectionError(f"Connection closed by server. {exc or ''}".strip()))

    def pause_writing(self) -> None:
        self._streams.pause_writing()

    def resume_writing(self) -> None:
        self._streams.resume_writing()
