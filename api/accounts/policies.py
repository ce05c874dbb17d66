"""The copy of all tenants' policies in Redis, kept as the database says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import redis.asyncio

from api.auth.principal import Account
from broker import keys
from broker.errors import BrokerError
from broker.policies import TenantPolicy
from config.logs import get_logger

log = get_logger(__name__)

#: A copy that was lost without a trace (a failover, a flush) is put right after this long.
_INTERVAL_S: Final = 60.0
_RETRY_S: Final = 1.0


class PolicyMirror:
    """Compares policies with the hashes in Redis and publishes those that differ.

    A change is published by whoever made it; this heals what did not arrive. Tenants that are not
    named stay as they are.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        set_policy: Callable[[str, TenantPolicy], Awaitable[None]],
    ) -> None:
        self._client = client
        self._set_policy = set_policy
        self._wake = asyncio.Event()

    def look(self) -> None:
        """Compare now; policies or Redis may have changed."""
        self._wake.set()

    async def run(self, accounts: Callable[[], Iterable[Account]]) -> None:
        """Compare at every `look` and every minute, until cancelled."""
        failing = False
        while True:
            self._wake.clear()
            try:
                await self.bring(accounts())
            except (BrokerError, redis.RedisError, OSError) as error:
                if not failing:
                    log.warning("policies_not_published", why=type(error).__name__)
                failing = True
            else:
                failing = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S if failing else _INTERVAL_S):
                    await self._wake.wait()

    async def bring(self, accounts: Iterable[Account]) -> int:
        """Publish each policy that Redis doesn't have; returns how many."""
        weights = await self._client.hgetall(keys.POLICY_WEIGHT)
        caps = await self._client.hgetall(keys.POLICY_CAP)
        queued = await self._client.hgetall(keys.POLICY_MAX_QUEUED)
        published = 0
        for account in accounts:
            name, policy = account.id.encode(), account.policy
            wanted = (policy.weight, policy.max_in_flight, policy.max_queued)
            if _numbers(weights.get(name), caps.get(name), queued.get(name)) != wanted:
                await self._set_policy(account.id, policy)
                published += 1
        if published:
            log.info("policies_published", count=published)
        return published


def _numbers(*values: bytes | str | None) -> tuple[float, ...] | None:
    """The values as numbers; None when one is missing or isn't a number."""
    try:
        return tuple(float(value) for value in values if value is not None)
    except ValueError:
        return None
