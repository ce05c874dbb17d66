"""Work that outlives the request that caused it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from config.logs import get_logger

log = get_logger(__name__)


class Background:
    """Keeps tasks referenced until they end; failures are logged, never lost."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_work_failed", exc_info=error)

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is under way; give up after `timeout_s`."""
        # Handlers that were just cancelled spawn their last work at their next step.
        for _ in range(3):
            await asyncio.sleep(0)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
