"""Probes, metrics, models."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from api import keys
from api.app import make_metrics_app
from broker.errors import BrokerUnavailableError
from tests.apiserver import CHAT, EMBED, Api, chat, job, ready_worker

ADMIN = {"Authorization": "Bearer admin"}


async def _samples(api: Api) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = await api.client.get("/metrics", headers=ADMIN)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(await response.text())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


async def test_healthz_needs_nothing(api: Api) -> None:
    response = await api.client.get("/healthz", headers={"Authorization": ""})
    assert (response.status, await response.json()) == (200, {"status": "ok"})


async def test_readyz_says_what_is_missing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ready() -> tuple[int, dict[str, Any]]:
        response = await api.client.get("/readyz", headers={"Authorization": ""})
        assert ("Retry-After" in response.headers) == (response.status == 503)
        return response.status, await response.json()

    status, body = await ready()
    assert (status, body["missing"]) == (503, [f"model:{CHAT}", f"model:{EMBED}"])
    api.queue.heartbeat(ready_worker(CHAT), ttl_s=60)
    api.queue.heartbeat(ready_worker(EMBED, "loading"), ttl_s=60)
    status, body = await ready()
    assert (status, body["missing"]) == (503, [f"model:{EMBED}"])
    assert body["models"][EMBED] == {"ready_workers": 0, "loading_workers": 1}
    api.queue.heartbeat(ready_worker(EMBED), ttl_s=60)
    status, body = await ready()
    assert (status, body["status"], body["missing"]) == (200, "ready", [])

    async def away() -> None:
        raise BrokerUnavailableError

    monkeypatch.setattr(api.app[keys.QUEUE], "ping", away, raising=False)
    status, body = await ready()
    assert status == 503
    assert "queue" in body["missing"]
    monkeypatch.undo()
    monkeypatch.setitem(api.app._state, keys.ACCOUNTS_READY, lambda: False)
    assert (await ready())[1]["missing"] == ["accounts"]


async def test_metrics_tell_of_requests_jobs_and_queues(api: Api) -> None:
    api.queue.heartbeat(ready_worker(CHAT), ttl_s=60)
    await api.client.post("/v1/jobs", json=job("hold", priority="batch"))
    await api.worker.holding.wait()
    await api.client.post("/v1/chat/completions", json=chat(frob=1))
    await api.client.get("/v1/models", headers={"Authorization": "Bearer x"})
    await api.client.get("/v1/jobs/not-there")
    await api.client.request("PROPFIND", "/coffee")
    samples = await _samples(api)

    def value(name: str, **labels: str) -> float:
        return samples[name, tuple(sorted(labels.items()))]

    count = "forebay_api_request_duration_seconds_count"
    assert value(count, method="POST", route="/v1/jobs", status="202") == 1
    assert value(count, method="GET", route="/v1/jobs/{job_id}", status="404") == 1
    assert value(count, method="other", route="other", status="404") == 1
    assert (
        value(
            "forebay_api_jobs_submitted_total",
            model=CHAT,
            endpoint="/v1/chat/completions",
            band="batch",
        )
        == 1
    )
    assert value("forebay_api_requests_refused_total", code="unsupported_parameter") == 1
    assert value("forebay_api_authentication_failures_total", reason="unknown_key") == 1
    assert value("forebay_broker_up") == 1
    assert value("forebay_broker_in_flight_jobs", model=CHAT) == 1
    assert value("forebay_broker_queue_depth_jobs", model=CHAT, band="batch") == 0
    assert value("forebay_broker_queue_oldest_seconds", model=CHAT, band="batch") == 0
    assert value("forebay_broker_ready_workers", model=CHAT) == 1
    assert value("forebay_broker_ready_workers", model=EMBED) == 0
    assert not [labels for _, labels in samples if "tenant" in dict(labels)]


async def test_metrics_outlive_the_queue(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object, **__: object) -> None:
        raise BrokerUnavailableError

    monkeypatch.setattr(api.app[keys.QUEUE], "workers", away, raising=False)
    samples = await _samples(api)
    assert samples["forebay_broker_up", ()] == 0
    assert not [name for name, _ in samples if name.startswith("forebay_broker_queue")]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("0.0.0.0", 401)])
async def test_the_scrapers_listener_is_open_on_loopback_only(
    api: Api, monkeypatch: pytest.MonkeyPatch, host: str, status: int
) -> None:
    settings = api.app[keys.SETTINGS]
    changed = settings.model_copy(
        update={"api": settings.api.model_copy(update={"metrics_host": host})}
    )
    monkeypatch.setitem(api.app._state, keys.SETTINGS, changed)
    async with TestClient(TestServer(make_metrics_app(api.app))) as client:
        assert (await client.get("/metrics")).status == status
        assert (await client.get("/metrics", headers=ADMIN)).status == 200
        assert (await client.get("/v1/jobs", headers=ADMIN)).status == 404
