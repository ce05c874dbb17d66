"""The webhook worker as a process: Celery tasks on their own queue, killed and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import standardwebhooks
from aiohttp import web

from broker import keys
from broker.webhooks import signing
from broker.webhooks.endpoints import Endpoint
from config.settings import Settings, load
from tests.apiserver import eventually
from tests.conftest import PATIENCE_S
from tests.webhooklab import Lab, Receiver, lab, receiving

ROOT = Path(__file__).parents[3]


@contextmanager
def worker(redis_url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "FOREBAY_REDIS__URL": redis_url,
        "FOREBAY_WEBHOOKS__KEY": "key-of-the-tests",
        "FOREBAY_WEBHOOKS__ALLOW_LOOPBACK": "true",
        "FOREBAY_WEBHOOKS__TIMEOUT_S": "2",
        "FOREBAY_WORKER__GRACE_S": "2",
        "FOREBAY_LOG__FORMAT": "json",
        "PYTHONPATH": str(ROOT),
    }
    with (tmp_path / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "webhooks"],
            cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture
async def here(valkey: str) -> AsyncIterator[Lab]:
    async with lab(valkey) as made:
        yield made


@pytest.fixture
def settings() -> Settings:
    return load(_env_file=None, webhooks={"key": "key-of-the-tests"})


async def test_a_killed_worker_sends_again_with_the_same_id(
    here: Lab, valkey: str, tmp_path: Path, settings: Settings
) -> None:
    answered = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        """Has it, and says so only when the worker is dead."""
        await answered.wait()
        return web.Response(status=204)

    async with receiving() as receiver:
        receiver.answers["/hook"] = slow
        endpoint = Endpoint(id="wep_1", url=receiver.url + "/hook", event_types=("*",))
        await here.publish("acme", endpoint)
        event = {"type": "job.completed", "tenant": "acme", "job": "job_x", "seq": 3, "ms": 1000}
        await here.client.rpush(keys.WEBHOOK_OUTBOX, orjson.dumps(event))
        with worker(valkey, tmp_path) as first:
            await eventually(lambda: receiver.got)
            first.kill()
            first.wait(10)
        answered.set()
        await here.pass_time(60)
        with worker(valkey, tmp_path) as second:
            await eventually(lambda: len(receiver.got) > 1)
            await _ends(here, "wep_1", "delivered")
            second.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(second.wait, 15) == 0
        secret = signing.shown(signing.secret(signing.installation_key(settings), "wep_1", 1))
        for got in receiver.got:
            standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
        assert {got.headers["webhook-id"] for got in receiver.got} == {"evt_x_3"}
        assert len(receiver.got) == 2
    log = (tmp_path / "worker.log").read_text()
    assert "webhook_attempt_ended" in log
    # Neither message nor secret nor address of a receiver is ever logged.
    assert receiver.url not in log
    assert secret not in log
    assert "Traceback" not in log


async def _ends(here: Lab, log: str, state: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            page, _ = await here.store.deliveries(log, limit=1)
            if page and page[0].state == state:
                return
            await asyncio.sleep(0.02)


async def test_a_slow_receiver_does_not_hold_up_the_others(
    here: Lab, valkey: str, tmp_path: Path
) -> None:
    release = asyncio.Event()
    inside: list[int] = [0]

    async def hang(_: web.Request) -> web.StreamResponse:
        inside.append(inside[-1] + 1)
        try:
            await release.wait()
        finally:
            inside.append(inside[-1] - 1)
        return web.Response(status=204)

    async with receiving() as receiver:
        receiver.answers["/slow"] = hang
        await here.publish(
            "acme",
            Endpoint(id="wep_slow", url=receiver.url + "/slow", event_types=("*",)),
            Endpoint(id="wep_fast", url=receiver.url + "/fast", event_types=("*",)),
        )
        for n in range(30):
            event = {"type": "job.failed", "tenant": "acme", "job": f"job_{n}", "seq": 3, "ms": 1}
            await here.client.rpush(keys.WEBHOOK_OUTBOX, orjson.dumps(event))
        with worker(valkey, tmp_path):
            await eventually(lambda: _count(receiver, "/fast") == 30)
            assert max(inside) == here.settings.max_in_flight_per_endpoint
            release.set()
            await eventually(lambda: _count(receiver, "/slow") >= 30)


def _count(receiver: Receiver, path: str) -> int:
    return sum(got.path == path for got in receiver.got)


def test_without_a_key_it_does_not_start(valkey: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers", "webhooks"],
        cwd=tmp_path,
        env={**os.environ, "FOREBAY_REDIS__URL": valkey, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "FOREBAY_WEBHOOKS__KEY" in done.stderr
    assert "Traceback" not in done.stderr
