"""Many callers of one event loop on few Redis connections.

Commands go out as they come and are answered in order; nobody waits for another's answer. What
comes up in one turn of the loop leaves in one system call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker.link import Link
from broker.wire import Arg, pack

#: Connections. One alone would let a large answer hold up all others.
LANES = 2
#: So many calls may wait on the first before the next is used: it holds up no more than these.
CROWD = 16


@dataclass(slots=True, eq=False)
class _Request:
    packed: bytes
    #: Replies to come.
    count: int
    done: asyncio.Future[list[Any]]
    #: On the event loop's clock.
    deadline: float = 0.0
    replies: list[Any] = field(default_factory=list)


class Exchange:
    """Sends commands and hands out their replies. For one event loop."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._lanes = [_Lane(client) for _ in range(LANES)]

    async def send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies, in order; a `ResponseError` is returned in its place.

        Raises what redis-py raises when the connection fails.
        """
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        lane = min(self._lanes, key=lambda lane: len(lane) // CROWD)
        lane.put(_Request(pack(commands), len(commands), done))
        return await done


class _Lane:
    """One connection of the pool's, kept for good; it connects when it is needed."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        # Untyped in redis-py.
        self._pool: Any = client.connection_pool
        self._connection: Any = None
        self._link: Link | None = None
        #: Not sent yet: the lane connects first.
        self._waiting: deque[_Request] = deque()
        #: Sent, the next to be answered first.
        self._sent: deque[_Request] = deque()
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests without an answer."""
        return len(self._waiting) + len(self._sent)

    def put(self, request: _Request) -> None:
        if self._link is not None:
            self._send(self._link, request)
            return
        self._waiting.append(request)
        if self._connecting is None:
            # A task of its own: redis-py goes through `asyncio.wait_for`, which in Python 3.11
            # can swallow a caller's cancellation.
            self._connecting = asyncio.create_task(self._connect())

    def _send(self, link: Link, request: _Request) -> None:
        timeout_s = self._connection.socket_timeout
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            request.deadline = loop.time() + timeout_s
            if self._timer is None:
                self._timer = loop.call_at(request.deadline, self._check)
        self._sent.append(request)
        link.write(request.packed)

    async def _connect(self) -> None:
        try:
            if self._connection is None:
                self._connection = await self._pool.get_connection()
            else:
                await self._connection.disconnect(nowait=True)
                await self._connection.connect()
        except BaseException as error:
            waiting, self._waiting = self._waiting, deque()
            _fail(waiting, error)
            if not isinstance(error, Exception):
                raise
        else:
            link = self._link = Link(self._connection, self._answered, self._lost)
            while self._waiting:
                request = self._waiting.popleft()
                # Whoever gave up waiting before it was sent doesn't want it sent.
                if not request.done.done():
                    self._send(link, request)
        finally:
            self._connecting = None

    def _answered(self, reply: Any) -> None:
        if isinstance(reply, RedisConnectionError):  # e.g. LOADING, NOAUTH: of no use as it is
            self._give_up(reply)
            return
        request = self._sent[0]
        request.replies.append(reply)
        if len(request.replies) < request.count:
            return
        self._sent.popleft()
        if not request.done.done():
            request.done.set_result(request.replies)
        if any(isinstance(each, ReadOnlyError) for each in request.replies):
            # It was the primary; whoever is now is found by connecting.
            self._give_up(RedisConnectionError("the server is no longer the primary"))

    def _check(self) -> None:
        """Give up a connection that leaves its oldest request unanswered for too long."""
        self._timer = None
        if not self._sent:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._sent[0].deadline:
            self._give_up(RedisTimeoutError("Timeout reading from socket"))
        else:
            self._timer = loop.call_at(self._sent[0].deadline, self._check)

    def _give_up(self, error: Exception) -> None:
        if self._link is not None:
            self._link.lose(error)

    def _lost(self, error: Exception) -> None:
        self._link = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        sent, self._sent = self._sent, deque()
        _fail(sent, error)


def _fail(requests: deque[_Request], error: BaseException) -> None:
    """A lane that was cancelled (the loop is ending) has lost its connection."""
    shown = error if isinstance(error, Exception) else RedisConnectionError("cancelled")
    for request in requests:
        if not request.done.done():
            request.done.set_exception(shown)
