"""The whole stack as a stranger would start it: `forebay up` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from broker.async_queue import AsyncRedisQueue
from broker.connections import connect, connect_async
from broker.conversations import RedisConversations
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.redis_queue import RedisQueue
from broker.results import EventHub, MemoryHub
from config.settings import load
from tests.apiserver import ALL_KINDS, Api, serving
from tests.conftest import PATIENCE_S

FOREBAY = str(Path(sys.executable).parent / "forebay")
PORTS = ("--api-port", "0", "--flower-port", "0")


@dataclass(frozen=True)
class Stack:
    """A running `forebay up`, and its addresses."""

    process: subprocess.Popen[str]
    data_dir: Path
    api: str
    flower: str
    metrics: str
    admin_key: str
    environment: dict[str, str]

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A `forebay` command against this stack."""
        return subprocess.run(
            [FOREBAY, *args, "--data-dir", str(self.data_dir)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def json(self, *args: str) -> Any:
        return json.loads(self.run(*args, "--json").stdout)


@contextmanager
def running(data_dir: Path, *args: str, **environment: str) -> Iterator[Stack]:
    """Start a stack on free ports; end it with SIGTERM, which it must do by itself."""
    env = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    } | environment
    with (data_dir.parent / f"{data_dir.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [FOREBAY, "up", "--data-dir", str(data_dir), *PORTS, *args],
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(PATIENCE_S)
                log.seek(0)
                pytest.fail(f"forebay up ended with {process.returncode}:\n{log.read()[-4000:]}")
            ready = json.loads(line)
            assert ready.pop("ready") is True
            yield Stack(process=process, data_dir=data_dir, environment=env, **ready)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
                pytest.fail("forebay up did not end")
            finally:
                process.stdout.close()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    return running


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One simulated stack for all tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("stack")
    with running(folder / "data", "--engine", "simulated") as started:
        yield started


@pytest.fixture(params=["memory", "valkey"])
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    few = {"max_conversations": 3}
    if request.param == "memory":
        settings = load(_env_file=None, api=few)
        memory = MemoryQueue(settings.queue)
        hub = MemoryHub(memory)
        await hub.start()
        async with serving(
            settings, memory, AsyncMemoryQueue(memory), hub, models=ALL_KINDS
        ) as running:
            yield running
        await hub.stop()
        return
    settings = load(_env_file=None, api=few, redis={"url": request.getfixturevalue("valkey")})
    client = connect(settings.redis)
    async with connect_async(settings.redis) as async_client:
        events = EventHub(async_client)
        await events.start()
        queue = AsyncRedisQueue(async_client, settings.queue)
        async with serving(
            settings,
            RedisQueue(client, settings.queue),
            queue,
            events,
            conversations=RedisConversations(
                async_client, ttl_s=60, most=settings.api.max_conversations
            ),
            models=ALL_KINDS,
        ) as running:
            yield running
        await events.stop()
    client.close()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=api.url + "v1", api_key="a", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client
