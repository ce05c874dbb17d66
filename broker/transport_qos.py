"""Credit and acknowledgements of a channel; for jobs, both are the lease registry's."""

from __future__ import annotations

from typing import Any, cast

from kombu.transport import redis, virtual

from broker import leases
from broker.transport_messages import is_lease


class QoS(redis.QoS):  # type: ignore[misc]
    """kombu's, with leases in the place of messages that wait to be acknowledged."""

    def can_consume(self) -> bool:
        if self.channel.model_queue is None:
            return bool(super().can_consume())
        return self._free() > 0

    def can_consume_max_estimate(self) -> int | None:
        if self.channel.model_queue is None:
            return cast("int | None", super().can_consume_max_estimate())
        return self._free()

    def _free(self) -> int:
        """Idle slots of the process. Leases outlive the channel they came through, so they are
        counted, and not this channel's deliveries."""
        registry = leases.installed()
        if registry is None:
            return 0
        capacity: int = self.prefetch_count or self.channel.claim_batch
        return max(capacity - registry.held, 0)

    def append(self, message: Any, delivery_tag: str) -> None:
        if is_lease(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if is_lease(delivery_tag):
            if (registry := leases.installed()) is not None:
                registry.acknowledge(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if is_lease(delivery_tag):
            if (registry := leases.installed()) is not None:
                registry.reject(delivery_tag, requeue)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Leases stay: they belong to the process, whose pool goes on with them after a reconnect
        and whose registry hands them back at the end."""
        for tag in [tag for tag in self._delivered if is_lease(tag)]:
            del self._delivered[tag]
        super().restore_unacked_once(stderr)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        if self.channel.model_queue is None:
            super().restore_visible(*args, **kwargs)
