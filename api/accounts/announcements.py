"""Word of account changes to the broker: policies into the queue, a notice over pub/sub."""

from __future__ import annotations

from typing import Protocol

import redis

from broker.connections import connect
from broker.errors import BrokerUnavailableError
from broker.keys import ACCOUNTS_CHANNEL
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from config.settings import Settings


class Broadcaster(Protocol):
    """Where the broker learns of accounts. Both calls may raise `BrokerError`."""

    def set_policy(self, tenant: str, policy: TenantPolicy) -> None: ...

    def notify(self) -> None:
        """Tell every API process to look at the change counter now."""
        ...


class RedisBroadcaster:
    """Connects when it is first used."""

    def __init__(self, client: redis.Redis, queue: RedisQueue) -> None:
        self._client = client
        self._queue = queue

    @classmethod
    def from_settings(cls, settings: Settings) -> RedisBroadcaster:
        client = connect(settings.redis)
        return cls(client, RedisQueue(client, settings.queue))

    def set_policy(self, tenant: str, policy: TenantPolicy) -> None:
        self._queue.set_policy(tenant, policy)

    def notify(self) -> None:
        try:
            self._client.publish(ACCOUNTS_CHANNEL, b"changed")
        except redis.RedisError as error:
            raise BrokerUnavailableError(
                f"Redis didn't take the notice: {type(error).__name__}"
            ) from None

    def close(self) -> None:
        self._client.close()
