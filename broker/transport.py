"""The kombu transport that claims jobs: a thin adapter of the queue and the lease registry.

It stands behind `redis://` (see `broker.app`). Queues named in the transport option `model_queues`
hold jobs and are consumed by claims (`broker.transport_channel`); all others (control, replies,
events) go kombu's own way, so that `inspect`, `control` and Flower work as ever.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis
from redis.exceptions import ResponseError

from broker import leases
from broker.transport_channel import Channel, NotForMessagesError

__all__ = ["Channel", "NotForMessagesError", "Poller", "Transport"]


class Poller(redis.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, which tells the event loop of each connection once and not at every turn."""

    loop: Any = None

    @property
    def fds(self) -> dict[int, Any]:
        found: dict[int, Any] = super().fds
        if self.loop is None:
            return found
        return {fd: channel for fd, channel in found.items() if fd not in self.loop.readers}


class Transport(redis.Transport):  # type: ignore[misc]
    """kombu's Redis transport with `Channel`."""

    Channel = Channel

    #: Refusals (READONLY, OOM, MISCONF…) count as a lost connection. Else one that meets the worker
    #: while it connects or declares its queues would end it.
    connection_errors = (*redis.Transport.connection_errors, ResponseError)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.cycle.loop = loop
        super().register_with_event_loop(connection, loop)
        if (registry := leases.installed()) is not None:
            registry.on_drain = lambda: loop.call_soon(_woken)


def _woken() -> None:
    """Runs in the event loop so that it looks at its flags."""
