"""A batch outlives the API process that drives it: killed, stopped, or taken for dead."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from api.accounts import schema
from api.accounts.database import make_engine
from api.accounts.service import AccountsService
from broker.connections import connect
from broker.jobs import Outcome, Status, Usage
from broker.redis_queue import RedisQueue
from config.settings import Settings, load
from tests.apiserver import CHAT
from tests.conftest import PATIENCE_S, free_port
from tests.integration.api_process import Process, running

LINES = 300
OUTPUT = b'{"object":"chat.completion"}'


class Worker:
    """Ends jobs as fast as it may, and remembers which."""

    def __init__(self, settings: Settings) -> None:
        self._client = connect(settings.redis)
        self.queue = RedisQueue(self._client, settings.queue)
        self.runs: Counter[str] = Counter()
        #: Jobs it may end.
        self.allowed = 0

    async def run(self) -> None:
        while True:
            if sum(self.runs.values()) < self.allowed:
                for claim in self.queue.claim(CHAT, "worker", limit=4):
                    outcome = Outcome(
                        status=Status.COMPLETED, output=OUTPUT, usage=Usage(output_tokens=1)
                    )
                    assert self.queue.complete(claim, outcome)
                    self.runs[claim.job.id] += 1
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def env(valkey: str, tmp_path: Path) -> dict[str, str]:
    settings = {
        "FOREBAY_REDIS__URL": valkey,
        "FOREBAY_DATABASE__URL": f"sqlite:///{tmp_path / 'accounts.db'}",
        "FOREBAY_AUTH__PEPPER": "a pepper that nobody guesses",
        "FOREBAY_DATA_DIR": str(tmp_path),
        "FOREBAY_API__SHUTDOWN_GRACE_S": "2",
        "FOREBAY_BATCHES__LEASE_S": "2",
        "FOREBAY_BATCHES__POLL_S": "0.2",
        "FOREBAY_BATCHES__WINDOW": "32",
        "FOREBAY_LOG__FORMAT": "json",
    }
    return {**os.environ, **settings}


def _with_port(env: dict[str, str]) -> dict[str, str]:
    return {**env, "FOREBAY_API__PORT": str(free_port())}


@pytest.fixture
def key(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in env.items():
        if name.startswith("FOREBAY_"):
            monkeypatch.setenv(name, value)
    settings = load(_env_file=None)
    engine = make_engine(settings.database)
    schema.upgrade(engine)
    engine.dispose()
    with AccountsService.from_settings(settings) as service:
        return service.create_key(service.create_tenant("tester").name).secret


@pytest.fixture
async def worker(key: str) -> AsyncIterator[Worker]:
    worker = Worker(load(_env_file=None))
    working = asyncio.create_task(worker.run())
    yield worker
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    worker.close()


def _client(process: Process, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=process.url + "/v1", api_key=key, max_retries=0, timeout=PATIENCE_S
    )


async def _begin(client: openai.AsyncOpenAI) -> Any:
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": CHAT, "messages": [{"role": "user", "content": "hi"}]}}
        for number in range(LINES)
    ]  # fmt: skip
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )


async def _completed(client: openai.AsyncOpenAI, batch_id: str, at_least: int) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.request_counts.completed >= at_least and (
                at_least < LINES or batch.status == "completed"
            ):
                return batch
            await asyncio.sleep(0.05)


async def _check(client: openai.AsyncOpenAI, worker: Worker, batch: Any) -> None:
    """Every line is there once, and every job ran once."""
    text = (await client.files.content(batch.output_file_id)).text
    ids = [json.loads(line)["custom_id"] for line in text.splitlines()]
    assert sorted(ids) == sorted(f"line-{number}" for number in range(LINES))
    assert batch.request_counts.model_dump() == {"total": LINES, "completed": LINES, "failed": 0}
    assert len(worker.runs) == LINES
    assert set(worker.runs.values()) == {1}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_batch_goes_on_after_its_process_has_ended(
    env: dict[str, str], key: str, worker: Worker, tmp_path: Path, how: signal.Signals
) -> None:
    worker.allowed = LINES // 3
    with running(_with_port(env), tmp_path, "first") as first:
        await first.started()
        async with _client(first, key) as client:
            batch = await _begin(client)
            await _completed(client, batch.id, LINES // 3)
        first.process.send_signal(how)
        await asyncio.to_thread(first.process.wait, 10)
    # What was in the queues goes on meanwhile; nobody collects it.
    worker.allowed = LINES // 3 + 20
    with running(_with_port(env), tmp_path, "second") as second:
        await second.started()
        worker.allowed = LINES
        async with _client(second, key) as client:
            done = await _completed(client, batch.id, LINES)
            await _check(client, worker, done)
    assert not list((tmp_path / "files" / "batches").iterdir())


async def test_a_driver_that_was_taken_for_dead_changes_nothing(
    env: dict[str, str], key: str, worker: Worker, tmp_path: Path
) -> None:
    worker.allowed = LINES // 3
    with running(_with_port(env), tmp_path, "first") as first:
        await first.started()
        async with _client(first, key) as client:
            batch = await _begin(client)
            await _completed(client, batch.id, LINES // 3)
        with running(_with_port(env), tmp_path, "second") as second:
            await second.started()
            first.process.send_signal(signal.SIGSTOP)
            try:
                worker.allowed = LINES - 10
                async with _client(second, key) as client:
                    await _completed(client, batch.id, LINES - 10)
                    # Back again in the middle of the other's work.
                    first.process.send_signal(signal.SIGCONT)
                    worker.allowed = LINES
                    done = await _completed(client, batch.id, LINES)
                    await _check(client, worker, done)
            finally:
                first.process.send_signal(signal.SIGCONT)
