"""Many callers of one event loop on few Redis connections.

Calls are sent by a few lanes, each with a connection. What comes up in one turn of the loop, or
while all lanes are taken, goes out in one piece: the more load, the fewer system calls per call.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from broker.wire import Arg, pack

#: Batches under way at once. Few make large batches; one alone would let a large answer hold up
#: all others.
LANES = 2
#: A batch isn't made larger than this.
BATCH_BYTES = 262_144


@dataclass(frozen=True, slots=True)
class _Request:
    packed: bytes
    #: Replies to come.
    count: int
    done: asyncio.Future[list[Any]]


class Exchange:
    """Sends commands and hands out their replies. For one event loop."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        # Untyped in redis-py.
        self._pool: Any = client.connection_pool
        self._waiting: deque[_Request] = deque()
        self._lanes: set[asyncio.Task[None]] = set()

    async def send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies, in order; a `ResponseError` is returned in its place.

        Raises what redis-py raises when the connection fails.
        """
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(pack(commands), len(commands), done))
        if len(self._lanes) < LANES:
            # A task of its own even for a lone call: redis-py goes through `asyncio.wait_for`,
            # which in Python 3.11 can swallow a caller's cancellation.
            lane = asyncio.create_task(self._drain())
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)
        return await done

    async def _drain(self) -> None:
        """Send batches until nobody waits."""
        while batch := self._next_batch():
            try:
                replies = await self._round_trip(
                    b"".join([each.packed for each in batch]),
                    sum(each.count for each in batch),
                )
            except BaseException as error:
                for each in batch:
                    if not each.done.done():
                        each.done.set_exception(_failure(error))
                if not isinstance(error, Exception):
                    raise
            else:
                taken = 0
                for each in batch:
                    if not each.done.done():
                        each.done.set_result(replies[taken : taken + each.count])
                    taken += each.count

    def _next_batch(self) -> list[_Request]:
        batch: list[_Request] = []
        size = 0
        while self._waiting and size < BATCH_BYTES:
            request = self._waiting.popleft()
            # Whoever gave up waiting before it was sent doesn't want it sent.
            if not request.done.done():
                batch.append(request)
                size += len(request.packed)
        return batch

    async def _round_trip(self, packed: bytes, count: int) -> list[Any]:
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(packed)
            replies: list[Any] = []
            demoted = False
            # One timer for the batch: redis-py's own, one for each reply, take longer than parsing.
            async with asyncio.timeout(connection.socket_timeout):
                for _ in range(count):
                    try:
                        replies.append(await connection.read_response(timeout=math.inf))
                    except ResponseError as error:
                        replies.append(error)
                        demoted = demoted or isinstance(error, ReadOnlyError)
            if demoted:  # it was the primary; whoever is now is found by connecting
                await connection.disconnect(nowait=True)
        except BaseException:
            # Answers may be left on the wire.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._pool.release(connection)
        return replies


def _failure(error: BaseException) -> Exception:
    """What callers get; a lane that was cancelled (the loop is ending) has lost its connection."""
    return error if isinstance(error, Exception) else RedisConnectionError("cancelled")
