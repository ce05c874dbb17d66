"""The API on the in-memory queue."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import Settings, load
from tests.apiserver import Api, serving


@pytest.fixture
def settings() -> Settings:
    return load(
        _env_file=None,
        api={
            "max_body_bytes": 65_536,
            "ping_interval_s": 0.2,
            "sync_timeout_s": 20,
            "read_timeout_s": 1,
            "write_timeout_s": 1,
        },
    )


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as running:
        yield running
    await hub.stop()
