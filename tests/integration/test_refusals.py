"""Redis refuses, stalls, loads or drops everybody: 503 meanwhile, and back without help.

A real worker process and the API's own queue and hub go through all of it on one Valkey; both may
tell of each outage once, however often they were refused.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from aiohttp.test_utils import TestClient, TestServer
from structlog.testing import capture_logs

from api import keys
from api.app import make_app
from broker.jobs import NewJob
from config.settings import Settings, load
from tests.apiserver import EMBED, MODELS, Accounts, job
from tests.conftest import PATIENCE_S, free_port
from tests.integration.model_worker import WorkerProcess
from tests.integration.worker_lab import until

#: After Redis is back, a job is accepted and done within this time (s).
RECOVERY_S = PATIENCE_S


class Troubled:
    """A Valkey that can be put into each kind of trouble, and out of it."""

    def __init__(self, binary: str, folder: Path) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self.client = redis.Redis(port=port, protocol=2)
        self._folder = folder
        self._command = [
            binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always",
        ]  # fmt: skip
        self.start()
        until(self.answers, "the server answers")

    def start(self, *options: str) -> None:
        self.process = subprocess.Popen([*self._command, *options], stdout=subprocess.DEVNULL)

    def answers(self) -> bool:
        with suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def begin(self, kind: str) -> None:
        match kind:
            case "readonly":
                self.client.replicaof("127.0.0.1", str(free_port()))
            case "oom":
                self.client.config_set("maxmemory", 1)
            case "misconf":
                (self._folder / "dump.rdb").mkdir()
                self.client.config_set("save", "3600 1")
                self.client.bgsave()
                until(self._save_failed, "a save fails")
            case "stalled":
                self.process.send_signal(signal.SIGSTOP)
            case "loading":
                with self.client.pipeline(transaction=False) as pipe:
                    for n in range(4096):
                        pipe.set(f"ballast:{n}", n)
                    pipe.execute()
                self.process.kill()
                self.process.wait(10)
                self.start("--key-load-delay", "500")

    def end(self, kind: str) -> None:
        match kind:
            case "readonly":
                self.client.replicaof("NO", "ONE")
            case "oom":
                self.client.config_set("maxmemory", 0)
            case "misconf":
                self.client.config_set("save", "")
                (self._folder / "dump.rdb").rmdir()
            case "stalled":
                self.process.send_signal(signal.SIGCONT)
            case "loading":
                until(self.answers, "the server has loaded")

    def _save_failed(self) -> bool:
        return self.client.info("persistence")["rdb_last_bgsave_status"] == "err"

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def server(valkey_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubled]:
    server = Troubled(valkey_binary, tmp_path_factory.mktemp("troubled"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def worker(server: Troubled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(server.url, tmp_path_factory.mktemp("worker") / "log")
    yield worker
    worker.close()


def _settings(url: str) -> Settings:
    return load(_env_file=None, redis={"url": url, "timeout_s": 1})


@pytest.fixture
async def client(server: Troubled) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    app = make_app(_settings(server.url), MODELS, authenticator=Accounts())
    headers = {"Authorization": "Bearer a"}
    async with TestClient(TestServer(app), headers=headers) as client:
        yield client


async def _submit(client: TestClient) -> tuple[int, dict[str, str], dict[str, object]]:  # type: ignore[type-arg]
    async with client.post("/v1/jobs", json=job(body={"max_tokens": 2})) as answer:
        return answer.status, dict(answer.headers), await answer.json()


async def _accepted_within(client: TestClient, patience_s: float) -> str:  # type: ignore[type-arg]
    deadline = time.monotonic() + patience_s
    while True:
        status, _, document = await _submit(client)
        if status == 202:
            return str(document["id"])
        assert time.monotonic() < deadline, document


async def _ends_well(client: TestClient, job_id: str) -> None:  # type: ignore[type-arg]
    async with client.get(f"/v1/jobs/{job_id}", params={"wait": str(RECOVERY_S)}) as answer:
        assert (await answer.json())["status"] == "completed"


@pytest.mark.parametrize("kind", ["readonly", "oom", "misconf", "stalled", "loading"])
async def test_an_outage_is_answered_survived_and_told_once(
    server: Troubled, worker: WorkerProcess, client: TestClient, kind: str  # type: ignore[type-arg]
) -> None:  # fmt: skip
    await _ends_well(client, await _accepted_within(client, RECOVERY_S))
    said = worker.events()
    with capture_logs() as lines:
        server.begin(kind)
        for _ in range(2 if kind in ("stalled", "loading") else 50):
            status, headers, document = await _submit(client)
            assert status == 503, document
            assert document["error"]["code"] == "broker_unavailable"  # type: ignore[index]
            assert int(headers["Retry-After"]) >= 1
        server.end(kind)
        begun = time.monotonic()
        job_id = await _accepted_within(client, RECOVERY_S)
        await _ends_well(client, job_id)
        assert time.monotonic() - begun < RECOVERY_S
        assert worker.process.poll() is None
    # Each request has its line in the access log; that isn't meant here.
    told = Counter(
        str(line["event"])
        for line in lines
        if line["log_level"] != "debug" and line["event"] != "request_failed"
    )
    assert 1 <= told["queue_unavailable"] <= 3  # once for each reason
    assert sum(told.values()) <= 8, told
    news = worker.events() - said
    assert max(news.values(), default=0) <= 2, news


async def test_cut_connections_are_not_even_noticed(
    server: Troubled, worker: WorkerProcess, client: TestClient  # type: ignore[type-arg]
) -> None:  # fmt: skip
    await _ends_well(client, await _accepted_within(client, RECOVERY_S))
    for _ in range(3):
        server.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        server.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        status, _, document = await _submit(client)
        assert status == 202, document
        await _ends_well(client, str(document["id"]))
    assert worker.process.poll() is None


async def test_a_deadline_passes_while_no_worker_is_there(
    server: Troubled, client: TestClient  # type: ignore[type-arg]
) -> None:  # fmt: skip
    """An API process sees to it."""
    queue = client.app[keys.QUEUE]  # type: ignore[index]
    late = NewJob(
        tenant="ten_a", model=EMBED, endpoint="/v1/embeddings", body=b"{}",
        deadline_ms=time.time_ns() // 1_000_000 + 200,
    )  # fmt: skip
    await queue.enqueue(late)
    async with client.get(f"/v1/jobs/{late.id}", params={"wait": str(RECOVERY_S)}) as answer:
        assert (await answer.json())["status"] == "expired"
