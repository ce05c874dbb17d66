"""Sees to what comes due in queues that nobody claims from.

Workers sweep their own queue; where none is left, deadlines would never pass and the leases of dead
owners never end. A sweep is one short script, bounded, and harmless when several processes do it.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

from broker.async_queue import AsyncRedisQueue
from broker.errors import BrokerError

#: Mean pause between two rounds of one process (s); jittered, so that processes don't meet.
SWEEP_EVERY_S = 3.0


async def sweep_forever(queue: AsyncRedisQueue) -> None:
    """Until it is cancelled; the queue tells of its outages by itself."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311
        with suppress(BrokerError):
            for name in await queue.queues():
                await queue.sweep(name)
