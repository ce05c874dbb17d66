"""The moment a process starts to shut down, for whoever waits on something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Closing:
    """Long polls and event streams end at once; their callers come back to another process."""

    def __init__(self) -> None:
        self._begun = False
        self._scopes: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        self._begun = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)

    @asynccontextmanager
    async def interrupts(self) -> AsyncIterator[None]:
        """Leave the block, without an error, when the process starts to shut down."""
        try:
            async with asyncio.timeout(0 if self._begun else None) as scope:
                self._scopes.add(scope)
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
        except TimeoutError:
            if not self._begun:
                raise
