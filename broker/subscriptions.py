"""A reader's end of a subscription to a job's events."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Protocol

from broker.jobs import Event

#: Events a slow reader may leave unread before they are dropped for a `Resync`.
QUEUE_EVENTS = 256


class Hub(Protocol):
    """What a subscription needs of its hub."""

    async def attach(self, subscription: Subscription) -> None:
        """Return once nothing published from then on can be missed."""
        ...

    def detach(self, subscription: Subscription) -> None: ...


class Resync:
    """Events may have been missed."""

    def __repr__(self) -> str:
        return "RESYNC"


RESYNC: Final = Resync()


class Subscription:
    """Events of one job from now on; an async context manager.

    Entering it returns once nothing published from then on can be missed; it raises
    `BrokerUnavailableError` when Redis does not confirm in time.
    """

    def __init__(self, hub: Hub, job_id: str) -> None:
        self.job_id = job_id
        self._hub = hub
        #: A list: most readers keep up, and 10,000 empty deques are 7 MB.
        self._items: list[Event | Resync] = []
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Subscription:
        await self._hub.attach(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hub.detach(self)

    async def next(self, timeout_s: float | None = None) -> Event | Resync | None:
        """The next event; None when none came in time. For one reader at a time."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            except TimeoutError:
                return None
            finally:
                self._waiter = None
        return self._items.pop(0)

    def put(self, item: Event | Resync) -> None:
        """For the hub: hand over an event."""
        if self._items and self._items[-1] is RESYNC:
            return
        if item is RESYNC or len(self._items) >= QUEUE_EVENTS:
            self._items.clear()
            item = RESYNC
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
