"""What the API promises of a job, on the in-memory queue and on real servers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from broker.jobs import Status
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, Api, eventually, job, running, serving
from tests.conftest import _flushed


@pytest.fixture(params=["memory", "valkey", "redis7"])
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    bounds = {"ping_interval_s": 0.2, "sync_timeout_s": 30}
    if request.param == "memory":
        settings = load(_env_file=None, api=bounds)
        memory = MemoryQueue(settings.queue)
        hub = MemoryHub(memory)
        await hub.start()
        async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as api:
            yield api
        await hub.stop()
        return
    url = _flushed(request.getfixturevalue(f"{request.param}_url"))
    settings = load(_env_file=None, redis={"url": url, "timeout_s": 2}, api=bounds)
    async with running(settings) as api:
        yield api


async def _submit(api: Api, payload: dict[str, Any]) -> dict[str, Any]:
    response = await api.client.post("/v1/jobs", json=payload)
    assert response.status == 202, await response.text()
    body: dict[str, Any] = await response.json()
    return body


async def _read(api: Api, job_id: str) -> dict[str, Any]:
    response = await api.client.get(f"/v1/jobs/{job_id}")
    assert response.status == 200
    body: dict[str, Any] = await response.json()
    return body


async def test_terms_of_a_job_reach_its_record(api: Api) -> None:
    deadline = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    submitted = await _submit(
        api,
        job("hold", deadline=deadline.isoformat(), execution_timeout=1.5, max_attempts=2, ttl=60),
    )
    record = api.queue.get(submitted["id"])
    assert record.deadline_ms == deadline.timestamp() * 1000
    assert (record.execution_timeout_ms, record.max_attempts) == (1500, 2)
    assert record.result_ttl_s == 60
    shown = await _read(api, submitted["id"])
    assert submitted["deadline_at"] == shown["deadline_at"] == deadline.timestamp()
    assert (await _read(api, (await _submit(api, job()))["id"]))["deadline_at"] is None


async def test_a_job_that_starts_too_late_expires(api: Api) -> None:
    submitted = await _submit(api, job(deadline=time.time() - 1))
    await eventually(lambda: api.queue.get(submitted["id"]).is_terminal)
    shown = await _read(api, submitted["id"])
    assert (shown["status"], shown["error"]["code"]) == ("expired", "deadline_exceeded")
    assert (shown["attempt"], shown["started_at"], shown["output"]) == (0, None, None)


async def test_a_delayed_job_waits(api: Api) -> None:
    submitted = await _submit(api, job(delay=0.3))
    at_once = await _submit(api, job())
    await eventually(lambda: api.queue.get(at_once["id"]).is_terminal)
    assert api.queue.get(submitted["id"]).status is Status.QUEUED
    assert api.queue.stats(CHAT).delayed == 1

    def started() -> bool:
        api.worker.ring()
        return api.queue.get(submitted["id"]).is_terminal

    await eventually(started)
    record = api.queue.get(submitted["id"])
    assert record.started_ms - record.created_ms >= 300
