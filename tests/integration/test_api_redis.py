"""The API on a real Valkey: delivery over pub/sub, several processes, an absent queue."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator

import orjson
import pytest
import redis

from broker.jobs import Delta, Status
from config.settings import Settings, load
from tests.apiserver import Api, chat, eventually, job, running
from tests.conftest import PATIENCE_S, free_port


class Server:
    """A Valkey that a test may kill and start again, with its data kept."""

    def __init__(self, binary: str, folder: str) -> None:
        self.port = free_port()
        self._argv = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", folder,
                      "--save", "", "--appendonly", "yes", "--appendfsync", "always"]  # fmt: skip
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(
            self.url,
            retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200),
            retry_on_error=[redis.ConnectionError, redis.BusyLoadingError],
        ) as client:
            client.ping()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    @property
    def running(self) -> bool:
        return self._process.poll() is None


@pytest.fixture
def server(valkey_binary: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="forebay-redis-") as folder:
        server = Server(valkey_binary, folder)
        yield server
        if server.running:
            server.kill()


def _settings(url: str) -> Settings:
    return load(
        _env_file=None,
        redis={"url": url, "timeout_s": 60},
        api={"ping_interval_s": 0.2, "sync_timeout_s": 30},
    )


@pytest.fixture
async def api(broker_url: str) -> AsyncIterator[Api]:
    async with running(_settings(broker_url)) as api:
        yield api


async def test_sync_stream_and_background(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat())
    assert (await response.json())["choices"][0]["message"]["content"] == "one two three"
    assert int(response.headers["x-queue-ms"]) >= 0
    response = await api.client.post("/v1/chat/completions", json=chat(stream=True))
    assert (await response.text()).endswith("data: [DONE]\n\n")
    response = await api.client.post("/v1/jobs", json=job(), headers={"Prefer": "wait=10"})
    assert (response.status, (await response.json())["status"]) == (200, "completed")


async def test_the_answer_of_a_submit_is_what_a_read_says(api: Api) -> None:
    submitted = await (
        await api.client.post("/v1/jobs", json=job("hold", metadata={"a": "b"}))
    ).json()
    await api.worker.holding.wait()
    shown = await (await api.client.get(submitted["urls"]["self"])).json()
    for moving in ("status", "attempt", "started_at", "queue"):
        submitted.pop(moving), shown.pop(moving)
    assert abs(shown.pop("created_at") - submitted.pop("created_at")) <= 1
    assert shown == submitted


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_cancels_its_job(api: Api, stream: bool) -> None:
    call = asyncio.create_task(
        api.client.post("/v1/chat/completions", json=chat("hold", stream=stream))
    )
    await api.worker.holding.wait()
    job_id = api.worker.held[0].job.id
    if stream:
        response = await call
        await response.content.readuntil(b"held")
        response.close()
    else:
        call.cancel()
    await eventually(lambda: api.queue.get(job_id).status is Status.CANCELLED)


async def test_events_resume_on_another_process(broker_url: str) -> None:
    """Two APIs that share nothing but Redis."""
    settings = _settings(broker_url)
    async with running(settings) as first, running(settings) as second:
        submitted = await first.client.post("/v1/jobs", json=job("hold", body={"stream": True}))
        url = (await submitted.json())["urls"]["events"]
        await first.worker.holding.wait()
        beginning = await first.client.get(url)
        await beginning.content.readuntil(b"held ")
        beginning.close()
        rest = await second.client.get(url, headers={"Last-Event-ID": "2"})
        await rest.content.readuntil(b"held ")
        first.worker.release()
        text = await rest.text()
        assert "id: 4\nevent: job.completed\n" in text
        poll = await second.client.get(url.removesuffix("/events") + "?wait=5")
        assert (await poll.json())["status"] == "completed"


async def test_a_cursor_that_is_too_old_gets_a_snapshot(api: Api) -> None:
    submitted = await api.client.post("/v1/jobs", json=job("hold", body={"stream": True}))
    url = (await submitted.json())["urls"]["events"]
    await api.worker.holding.wait()
    claim = api.worker.held[0]
    for number in range(1500):
        piece = Delta(job_id=claim.job.id, attempt=claim.attempt, text=f"{number} ")
        api.queue.emit(claim.queue, [piece])
    response = await api.client.get(url, headers={"Last-Event-ID": "2"})
    await response.content.readuntil(b"event: job.snapshot\n")
    snapshot = orjson.loads((await response.content.readline()).removeprefix(b"data: "))
    assert snapshot["text"] == "held " + "".join(f"{number} " for number in range(1500))
    api.worker.release()
    assert f"id: {snapshot['seq'] + 1}\nevent: job.completed" in await response.text()


async def test_redis_down_at_submit_is_503_and_leaves_no_job(server: Server) -> None:
    async with running(_settings(server.url)) as api:
        assert (await api.client.post("/v1/jobs", json=job("hold"))).status == 202
        await api.worker.holding.wait()
        server.kill()
        for path, payload in (
            ("/v1/jobs", job()),
            ("/v1/chat/completions", chat()),
            ("/v1/chat/completions", chat(stream=True)),
        ):
            # Nobody waits for an answer that can't come.
            async with asyncio.timeout(PATIENCE_S):
                response = await api.client.post(path, json=payload)
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "broker_unavailable"
            assert int(response.headers["Retry-After"]) >= 1
        assert (await api.client.get("/readyz")).status == 503
        assert (await api.client.get("/healthz")).status == 200
        server.start()
        listed = await (await api.client.get("/v1/jobs")).json()
        assert [entry["status"] for entry in listed["data"]] == ["in_progress"]
        assert (await api.client.post("/v1/chat/completions", json=chat())).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_waiting_call_survives_a_restart_of_redis(server: Server, stream: bool) -> None:
    async with running(_settings(server.url)) as api:
        call = asyncio.create_task(
            api.client.post("/v1/chat/completions", json=chat("hold", stream=stream))
        )
        await api.worker.holding.wait()
        server.kill()
        server.start()
        api.worker.release()
        response = await call
        assert response.status == 200
        text = await response.text()
        assert "to the end" in text
        assert text.count("held") == 1
