"""The Flower console as a process of its own, on a real server with jobs in its queues."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import aiohttp
import pytest
import redis

from broker.jobs import NewJob
from broker.redis_queue import RedisQueue
from config import settings as config_settings
from tests.conftest import PATIENCE_S, free_port

CHAT = "smollm2-135m"
AUTH = "operator:correct horse"

Start = Callable[..., str]


@pytest.fixture
def start(valkey: str) -> Iterator[Start]:
    """Starts a console; returns its address once it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(**variables: str) -> str:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.console"],
            env={
                **os.environ,
                "FOREBAY_REDIS__URL": valkey,
                "FOREBAY_FLOWER__PORT": str(port),
                **variables,
            },
        )
        started.append(process)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert process.poll() is None, f"ended with {process.returncode}"
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.05)
        raise AssertionError("the console does not listen")

    yield begin
    for process in started:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def waiting(valkey: str) -> None:
    """Three jobs of one tenant and one of another, none claimed."""
    with redis.Redis.from_url(valkey) as client:
        queue = RedisQueue(client, config_settings.Queue())
        for tenant in ("ten_a", "ten_a", "ten_a", "ten_b"):
            queue.enqueue(
                NewJob(tenant=tenant, model=CHAT, endpoint="/v1/chat/completions", body=b"{}")
            )


@pytest.mark.usefixtures("waiting")
async def test_it_shows_true_depth_and_a_row_per_tenant(start: Start) -> None:
    url = start()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/api/queues/length") as response:
            assert response.status == 200
            assert "Access-Control-Allow-Origin" not in response.headers
            rows = {row["name"]: row for row in (await response.json())["active_queues"]}
        assert rows[CHAT]["messages"] == 4
        assert rows[f"{CHAT} · tenant ten_a"]["messages"] == 3
        assert rows[f"{CHAT} · tenant ten_b"]["messages"] == 1
        assert rows["all-minilm-l6-v2"]["messages"] == 0
        async with session.get(f"{url}/broker") as response:
            assert response.status == 200
            page = await response.text()
        assert f"{CHAT} · tenant ten_a" in page
        for path in ("/tasks", "/workers", "/api/workers", "/api/tasks", "/healthcheck"):
            async with session.get(url + path) as response:
                assert response.status == 200, path


@pytest.mark.usefixtures("waiting")
async def test_with_a_password_nothing_is_shown_without_it(start: Start) -> None:
    url = start(FOREBAY_FLOWER__BASIC_AUTH=AUTH)
    paths = ("/broker", "/api/queues/length", "/tasks", "/workers", "/api/workers", "/metrics")
    async with aiohttp.ClientSession() as session:
        for path in paths:
            async with session.get(url + path) as response:
                assert response.status == 401, path
            wrong = {"Authorization": aiohttp.encode_basic_auth("operator", "wrong")}
            async with session.get(url + path, headers=wrong) as response:
                assert response.status == 401, path
            right = {"Authorization": aiohttp.encode_basic_auth(*AUTH.split(":"))}
            async with session.get(url + path, headers=right) as response:
                assert response.status == 200, path


async def test_without_a_password_only_this_machine_and_no_operations(start: Start) -> None:
    url = start()
    async with aiohttp.ClientSession() as session:
        # A website whose name was made to resolve to the loopback.
        async with session.get(f"{url}/broker", headers={"Host": "evil.example"}) as response:
            assert response.status == 403
        async with session.get(f"{url}/broker", headers={"Host": "localhost"}) as response:
            assert response.status == 200
        for path in ("/api/worker/shutdown/x", "/api/task/send-task/forebay.run_job"):
            async with session.post(url + path, json={"args": ["job_x"]}) as response:
                assert response.status == 403, path


@pytest.mark.parametrize(
    "variables",
    [
        {"FOREBAY_FLOWER__HOST": "0.0.0.0"},
        {"FOREBAY_ENV": "production"},
        {"FOREBAY_FLOWER__BASIC_AUTH": "no-colon"},
        {"FOREBAY_FLOWER__BASIC_AUTH": "operator:geheimnisträger"},
    ],
)
def test_it_does_not_start_open_to_others(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infra.console"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "FOREBAY_FLOWER__BASIC_AUTH" in done.stderr


async def test_while_redis_is_away_it_says_so(start: Start) -> None:
    url = start(FOREBAY_REDIS__URL=f"redis://127.0.0.1:{free_port()}/0")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/api/queues/length") as response:
            assert response.status == 503
        async with session.get(f"{url}/broker") as response:
            assert response.status == 200
