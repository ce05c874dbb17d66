"""Events of jobs as they happen, for everything in one event loop that waits for some job.

Pub/sub loses what is published while nobody listens, so a waiter subscribes first and reads the
job's record or log then. A `Resync` says that something may have been missed: read them again.

A hub listens for good to the jobs whose ids bear its mark. Whoever makes a job only to wait for it
takes such an id: the subscription stands before the job does, and costs no round trip.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from broker import keys
from broker.errors import BrokerUnavailableError
from broker.jobs import Event, marked_job_id, new_job_id, new_mark
from broker.link import Link
from broker.memory import MemoryQueue
from broker.subscriptions import QUEUE_EVENTS, RESYNC, Resync, Subscription
from broker.wire import decode_event, pack
from config.logs import get_logger

__all__ = ["QUEUE_EVENTS", "RESYNC", "EventHub", "MemoryHub", "Resync", "Subscription"]

log = get_logger(__name__)

#: Longest wait for Redis to confirm a subscription.
CONFIRM_TIMEOUT_S = 5.0
#: The same once an attempt to connect has failed; usually the next attempt's end comes earlier.
DOWN_CONFIRM_TIMEOUT_S = 0.5
#: A silent connection is probed after this long, and given up after twice as long.
PING_INTERVAL_S = 5.0
#: Pause before the first attempt to connect again; doubles up to the second value.
BACKOFF_S = (0.05, 2.0)


class _Channel:
    """A channel that somebody here listens to."""

    def __init__(self) -> None:
        self.readers: set[Subscription] = set()
        #: True when the subscription stands, False when there was nobody to ask; a new one after
        #: each loss of the connection and each failure to connect.
        self.confirmed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        #: It stood before the connection was lost.
        self.lost = False


class EventHub:
    """One pub/sub connection for all subscriptions of an event loop.

    It connects by itself and keeps trying; after a loss each reader gets a `Resync` as soon as its
    channel is subscribed again.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        # Untyped in redis-py.
        self._pool: Any = client.connection_pool
        self._channels: dict[bytes, _Channel] = {}
        #: SUBSCRIBEs sent and not confirmed, per channel. A channel stands when none is left.
        self._unconfirmed: dict[bytes, int] = {}
        self._mark = new_mark()
        self._pattern = keys.channel(f"job_??????????{self._mark}*").encode()
        channel = re.escape(keys.channel("job_")) + ".{10}" + self._mark
        self._is_marked = re.compile(channel.encode()).match
        #: The subscription to all jobs with the mark stands.
        self._stands = False
        self._link: Link | None = None
        #: The last attempt to connect failed.
        self._down = False
        #: Somebody wants to get in while it is down.
        self._hurry = asyncio.Event()
        self._heard = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._task = asyncio.create_task(self._run(), name="event-hub")

    async def stop(self) -> None:
        if self._task is not None:
            await _end({self._task})
            self._task = None

    def subscribe(self, job_id: str) -> Subscription:
        """To be entered with `async with`."""
        return Subscription(self, job_id)

    def new_job_id(self) -> str:
        """An id with the hub's mark, for a job that is made to be waited for."""
        return marked_job_id(self._mark)

    async def attach(self, subscription: Subscription) -> None:
        name = keys.channel(subscription.job_id).encode()
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel()
            if not self._is_marked(name):
                self._say("SUBSCRIBE", name)
            elif self._stands:
                channel.confirmed.set_result(True)
        channel.readers.add(subscription)
        if self._down:
            self._hurry.set()
        try:
            async with asyncio.timeout(DOWN_CONFIRM_TIMEOUT_S if self._down else CONFIRM_TIMEOUT_S):
                while not channel.confirmed.done():
                    if not await asyncio.shield(channel.confirmed):
                        raise BrokerUnavailableError("Redis can't be reached")
        except TimeoutError:
            self.detach(subscription)
            raise BrokerUnavailableError("Redis did not confirm a subscription in time") from None
        except BaseException:
            self.detach(subscription)
            raise

    def detach(self, subscription: Subscription) -> None:
        name = keys.channel(subscription.job_id).encode()
        channel = self._channels.get(name)
        if channel is None:
            return
        channel.readers.discard(subscription)
        if not channel.readers:
            del self._channels[name]
            if not self._is_marked(name):
                self._say("UNSUBSCRIBE", name)

    def _say(self, verb: str, name: bytes) -> None:
        """Nothing is said while there is no connection."""
        if self._link is None:
            return
        if verb == "SUBSCRIBE":
            self._unconfirmed[name] = self._unconfirmed.get(name, 0) + 1
        self._link.write(pack([(verb, name)]))

    async def _run(self) -> None:
        pause, lost = BACKOFF_S[0], False
        while True:
            connection = self._pool.make_connection()
            try:
                await connection.connect()
                pause = BACKOFF_S[0]
                if lost:
                    lost = False
                    log.info("event_hub_connected")
                await self._serve(connection)
            except (RedisError, OSError) as error:
                if not lost:
                    lost = True
                    log.warning("event_hub_disconnected", error=str(error))
            finally:
                await connection.disconnect(nowait=True)
            self._lose()
            await self._pause(pause)
            pause = min(pause * 2, BACKOFF_S[1])

    async def _pause(self, longest_s: float) -> None:
        """Until the next attempt to connect; no longer than needed when somebody waits for it."""
        await asyncio.sleep(BACKOFF_S[0] * random.uniform(0.5, 1.0))  # noqa: S311
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s * random.uniform(0.5, 1.0)):  # noqa: S311
                await self._hurry.wait()

    async def _serve(self, connection: AbstractConnection) -> None:
        """Until the connection breaks, which it raises."""
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        lost: asyncio.Future[None] = loop.create_future()

        def on_lost(error: Exception) -> None:
            if not lost.done():
                lost.set_exception(error)

        link = self._link = Link(connection, self._hear, on_lost)
        self._subscribe_again(link)
        probing = asyncio.create_task(self._probe(link))
        try:
            await lost
        finally:
            await _end({probing})

    def _hear(self, reply: Any) -> None:
        self._heard = asyncio.get_running_loop().time()
        if isinstance(reply, RedisError):
            raise reply
        kind = reply[0]
        if kind == b"pmessage":
            self._deliver(reply[2], reply[3])
        elif kind == b"message":
            self._deliver(reply[1], reply[2])
        elif kind == b"subscribe":
            self._confirm(reply[1])
        elif kind == b"psubscribe":
            self._stands = True
            for name, channel in self._channels.items():
                if self._is_marked(name):
                    self._stand(channel)

    async def _probe(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            silent = loop.time() - self._heard
            if silent > 2 * PING_INTERVAL_S:
                link.lose(TimeoutError("silent connection"))
            elif silent >= PING_INTERVAL_S:
                link.write(pack([("PING",)]))

    def _deliver(self, name: bytes, payload: bytes) -> None:
        channel = self._channels.get(name)
        if channel is None:
            return
        try:
            event = decode_event(payload)
        except (ValueError, KeyError, TypeError):
            log.warning("event_not_understood", channel=name.decode(errors="replace"))
            return
        for reader in channel.readers:
            reader.put(event)

    def _confirm(self, name: bytes) -> None:
        left = self._unconfirmed.get(name, 1) - 1
        if left > 0:
            self._unconfirmed[name] = left
            return
        self._unconfirmed.pop(name, None)
        channel = self._channels.get(name)
        if channel is not None:
            self._stand(channel)

    @staticmethod
    def _stand(channel: _Channel) -> None:
        if channel.confirmed.done():
            return
        channel.confirmed.set_result(True)
        if channel.lost:
            channel.lost = False
            for reader in channel.readers:
                reader.put(RESYNC)

    def _lose(self) -> None:
        """The connection is gone, or there was none to be had.

        Whoever was subscribed may miss events from here on; whoever waits to be is told at once
        that there is no server, and goes on waiting when one was just there.
        """
        self._down, self._link = self._link is None, None
        self._stands = False
        self._hurry.clear()
        for channel in self._channels.values():
            if channel.confirmed.done():
                channel.lost = True
            elif self._down:
                channel.confirmed.set_result(False)
            else:
                continue
            channel.confirmed = asyncio.get_running_loop().create_future()

    def _subscribe_again(self, link: Link) -> None:
        """On a new connection: all channels, whatever was still to be said on the old one."""
        self._down = False
        names = [name for name in self._channels if not self._is_marked(name)]
        self._unconfirmed = dict.fromkeys(names, 1)
        link.write(pack([("PSUBSCRIBE", self._pattern)]))
        if names:
            link.write(pack([("SUBSCRIBE", *names)]))


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    Once may not do: in Python 3.11 `asyncio.wait_for`, which redis-py uses, can swallow it.
    """
    while waiting := {task for task in tasks if not task.done()}:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=0.1)


class MemoryHub:
    """The same on a `MemoryQueue`; nothing is ever lost except by slow readers."""

    def __init__(self, memory: MemoryQueue) -> None:
        self._memory = memory
        self._readers: dict[str, set[Subscription]] = {}
        self._end: Callable[[], None] | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def pass_on(job_id: str, event: Event) -> None:
            # Whoever subscribes from here on doesn't hear of it, as with Redis.
            for reader in tuple(self._readers.get(job_id, ())):
                loop.call_soon_threadsafe(reader.put, event)

        self._end = self._memory.subscribe(pass_on)

    async def stop(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None

    def subscribe(self, job_id: str) -> Subscription:
        return Subscription(self, job_id)

    @staticmethod
    def new_job_id() -> str:
        """Any will do: nothing is sent for a subscription."""
        return new_job_id()

    async def attach(self, subscription: Subscription) -> None:
        self._readers.setdefault(subscription.job_id, set()).add(subscription)

    def detach(self, subscription: Subscription) -> None:
        readers = self._readers.get(subscription.job_id, set())
        readers.discard(subscription)
        if not readers:
            self._readers.pop(subscription.job_id, None)
