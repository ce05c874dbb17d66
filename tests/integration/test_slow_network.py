"""The network between Forebay and Redis is slow, or lets nothing through for a while.

Nothing breaks, so nobody is told: API and worker have their timeouts and their leases. A job that
runs while nothing gets through loses its lease, since silence lasts longer than that.
"""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import CancelledError
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from aiohttp.test_utils import TestClient, TestServer

from api.app import make_app
from broker.redis_queue import RedisQueue
from config.settings import Queue, load
from loadtests.cut_proxy import Network, serve
from loadtests.lab import listening
from tests.apiserver import CHAT, MODELS, Accounts, eventually, job
from tests.conftest import PATIENCE_S, free_port
from tests.integration.model_worker import WorkerProcess
from tests.integration.worker_lab import until

TIMEOUT_S = 1.0
LEASE_S = 2.0
#: After the network lets bytes through again, a job is accepted and done within this time (s).
RECOVERY_S = PATIENCE_S


class SlowProxy:
    """A proxy in a thread of its own, so that it doesn't share the API's event loop."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._network = Network()
        self._task = self._loop.create_task(serve(self.port, target, self._network))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: listening(self.port), "the proxy listens")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, suppress(CancelledError):
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._task

    def delay(self, seconds: float) -> None:
        self._loop.call_soon_threadsafe(setattr, self._network, "delay_s", seconds)

    def stall(self) -> None:
        self._loop.call_soon_threadsafe(self._network.stall)

    def flow(self) -> None:
        self._loop.call_soon_threadsafe(self._network.flow)

    def close(self) -> None:
        self.flow()
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)


@pytest.fixture
def network(valkey: str) -> Iterator[SlowProxy]:
    proxy = SlowProxy(urlsplit(valkey).port or 6379)
    yield proxy
    proxy.close()


@pytest.fixture
def worker(network: SlowProxy, tmp_path: Path) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(
        f"redis://127.0.0.1:{network.port}/0",
        tmp_path / "log",
        FOREBAY_QUEUE__LEASE_TTL_S=str(LEASE_S),
        FOREBAY_QUEUE__RENEW_EVERY_S="0.5",
        FOREBAY_SIMULATED__STEP_MS="20",
    )
    yield worker
    worker.close()


@pytest.fixture
async def client(network: SlowProxy) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    settings = load(
        _env_file=None,
        redis={"url": f"redis://127.0.0.1:{network.port}/0", "timeout_s": TIMEOUT_S},
        queue={"lease_ttl_s": LEASE_S, "renew_every_s": 0.5},
    )
    app = make_app(settings, MODELS, authenticator=Accounts())
    headers = {"Authorization": "Bearer a"}
    async with TestClient(TestServer(app), headers=headers) as client:
        yield client


async def _submit(client: TestClient, key: str, tokens: int = 2) -> tuple[int, str]:  # type: ignore[type-arg]
    """Status and job id; a refusal must come in time and say when to come again."""
    begun = time.monotonic()
    body = job(body={"max_tokens": tokens})
    async with client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key}) as answer:
        document = await answer.json()
        if answer.status in (200, 202):
            return answer.status, document["id"]
        assert (answer.status, document["error"]["code"]) == (503, "broker_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert time.monotonic() - begun < PATIENCE_S / 2
        return 503, ""


async def _ends_well(client: TestClient, job_id: str) -> None:  # type: ignore[type-arg]
    async with client.get(f"/v1/jobs/{job_id}", params={"wait": str(RECOVERY_S)}) as answer:
        assert (await answer.json())["status"] == "completed"


async def test_nothing_is_lost_or_doubled_while_nothing_gets_through(
    valkey: str, network: SlowProxy, worker: WorkerProcess, client: TestClient  # type: ignore[type-arg]
) -> None:  # fmt: skip
    direct = redis.Redis.from_url(valkey, protocol=2)
    queue = RedisQueue(direct, Queue())
    try:
        ids = {(await _submit(client, "first"))[1]}
        await _ends_well(client, *ids)
        running = (await _submit(client, "long", tokens=60))[1]
        ids.add(running)
        await eventually(lambda: queue.get(running).status == "in_progress")

        network.stall()
        stalled = time.monotonic()
        keys = []
        while time.monotonic() < stalled + LEASE_S + 1.0:
            keys.append(f"stalled {len(keys)}")
            assert (await _submit(client, keys[-1]))[0] == 503
        network.flow()

        begun = time.monotonic()
        for key in keys:
            while not (found := (await _submit(client, key))[1]):
                assert time.monotonic() - begun < RECOVERY_S
            ids.add(found)
        for job_id in ids:
            await _ends_well(client, job_id)
        assert time.monotonic() - begun < RECOVERY_S
        assert worker.process.poll() is None
        records, _ = queue.list_jobs("ten_a", limit=100)
        assert {each.id for each in records} == ids
        assert len(ids) == 2 + len(keys)
        for job_id in ids:
            events, _ = queue.events(job_id)
            assert [event.type.is_terminal for event in events].count(True) == 1
        assert queue.stats(CHAT).in_flight == 0
    finally:
        direct.close()


async def test_a_slow_network_only_takes_longer(
    network: SlowProxy, worker: WorkerProcess, client: TestClient  # type: ignore[type-arg]
) -> None:  # fmt: skip
    network.delay(0.04)
    for key in "ab":
        status, job_id = await _submit(client, key)
        assert status == 202
        await _ends_well(client, job_id)
    assert worker.process.poll() is None
