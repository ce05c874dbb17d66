"""`infra/nginx/forebay.conf` in a real nginx, in front of two API processes' applications."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest

from config.settings import load
from loadtests import nginx
from loadtests.lab import listening
from tests.apiserver import Api, eventually, job, running
from tests.conftest import PATIENCE_S, free_port, missing

KEY = {"Authorization": "Bearer a"}


@dataclass
class Front:
    """nginx and what is behind it; both replicas share one Valkey."""

    session: aiohttp.ClientSession
    replicas: tuple[Api, Api]

    def release(self) -> None:
        """Finish the jobs that are held, whichever replica's worker has them."""
        for replica in self.replicas:
            replica.worker.release()

    @property
    def held(self) -> int:
        return sum(len(replica.worker.held) for replica in self.replicas)


@pytest.fixture
async def front(valkey: str, tmp_path: Path) -> AsyncIterator[Front]:
    if nginx.program() is None:
        missing("nginx")
    settings = load(
        _env_file=None, redis={"url": valkey, "timeout_s": 2}, api={"ping_interval_s": 0.2}
    )
    async with running(settings) as one, running(settings) as other:
        ports = [replica.client.port for replica in (one, other)]
        listen = free_port()
        argv = nginx.command(tmp_path, listen=listen, replicas=[port for port in ports if port])
        with (tmp_path / "nginx.log").open("wb") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            await eventually(lambda: process.poll() is not None or listening(listen))
            assert process.poll() is None, (tmp_path / "nginx.log").read_text()
            async with aiohttp.ClientSession(f"http://127.0.0.1:{listen}", headers=KEY) as session:
                yield Front(session, (one, other))
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 10)


async def _events(response: aiohttp.ClientResponse, until: str) -> list[int]:
    """Numbers of the events that come, up to one of that name."""
    seen = []
    seq = 0
    async with asyncio.timeout(PATIENCE_S):
        async for line in response.content:
            if line.startswith(b"id: "):
                seq = int(line[4:])
                seen.append(seq)
            elif line.strip() == f"event: {until}".encode():
                break
    return seen


async def test_a_stream_arrives_as_it_happens_and_goes_on_at_the_other_replica(
    front: Front,
) -> None:
    async with front.session.post("/v1/jobs", json=job("hold", body={"stream": True})) as response:
        url = (await response.json())["urls"]["events"]
    await eventually(lambda: front.held)
    async with front.session.get(url) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        # The job stands still with one word said, so what is read here was not held back.
        seen = await _events(response, "job.delta")
        assert seen == [1, 2, 3]
        # Pings come through as well.
        async with asyncio.timeout(PATIENCE_S):
            while b": ping" not in await response.content.readline():
                pass
    # Each replica in turn, whichever had the first stream.
    for replica in front.replicas:
        headers = {"Last-Event-ID": "2"}
        async with replica.client.get(url, headers=headers) as response:
            assert await _events(response, "job.delta") == [3]
    async with front.session.get(url, headers={"Last-Event-ID": str(seen[-1])}) as response:
        front.release()
        assert await _events(response, "job.completed") == [4]


async def test_streams_are_shared_out_between_the_replicas(front: Front) -> None:
    async with front.session.post("/v1/jobs", json=job("hold", body={"stream": True})) as response:
        url = (await response.json())["urls"]["events"]
    streams = [await front.session.get(url) for _ in range(6)]
    counts = [_open_requests(replica) for replica in front.replicas]
    for stream in streams:
        stream.close()
    assert sum(counts) == 6
    assert min(counts) >= 2


def _open_requests(replica: Api) -> int:
    """Connections of a replica that a request is being handled on."""
    server = replica.client.server.runner.server  # type: ignore[union-attr]
    assert server is not None
    return sum(each._request_in_progress for each in server.connections)


async def test_request_ids_pass_through(front: Front) -> None:
    async with front.session.get("/v1/models", headers={"x-request-id": "mine-1"}) as response:
        assert (response.status, response.headers["x-request-id"]) == (200, "mine-1")
    async with front.session.get("/v1/jobs/job_00000000000000000000000000") as response:
        assert response.status == 404
        error = (await response.json())["error"]
        assert response.headers["x-request-id"] == error["request_id"]


async def test_a_body_beyond_the_limit_is_refused_and_one_below_it_is_not(front: Front) -> None:
    async with front.session.post("/v1/jobs", data=BytesIO(b"x" * (11 << 20))) as response:
        assert response.status == 413
        error = (await response.json())["error"]
    assert error["code"] == "payload_too_large"
    assert error["request_id"] == response.headers["x-request-id"]
    async with front.session.post("/v1/jobs", data=BytesIO(b"x" * (9 << 20))) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (
            400,
            "invalid_request",
        )


async def test_metrics_are_not_for_the_outside(front: Front) -> None:
    async with front.session.get("/metrics") as response:
        assert response.status == 404


async def test_a_replica_that_is_gone_is_passed_over(front: Front) -> None:
    await front.replicas[0].client.server.close()
    for _ in range(6):
        async with front.session.get("/v1/models") as response:
            assert response.status == 200
    await front.replicas[1].client.server.close()
    async with front.session.get("/v1/models") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert (await response.json())["error"]["code"] == "unavailable"
