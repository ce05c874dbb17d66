"""Pages of other origins: none by default, those of the setting otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import Api, chat, serving

OURS, OTHER = {"Origin": "https://app.example"}, {"Origin": "https://evil.example"}
ASKING = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


@pytest.fixture(params=["https://app.example, https://b.example", "*"])
async def open_api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    settings = load(_env_file=None, api={"cors_origins": request.param})
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as running:
        yield running
    await hub.stop()


async def test_a_preflight_needs_no_credential_and_brings_one_in(open_api: Api) -> None:
    headers = {**OURS, **ASKING, "Authorization": ""}
    response = await open_api.client.options("/v1/chat/completions", headers=headers)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] in ("*", OURS["Origin"])
    assert response.headers["Access-Control-Allow-Headers"] == "authorization"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_and_streams_and_errors_can_be_read(open_api: Api, stream: bool) -> None:
    for body in (chat(stream=stream), {}):
        response = await open_api.client.post("/v1/chat/completions", json=body, headers=OURS)
        await response.read()
        assert response.headers["Access-Control-Allow-Origin"] in ("*", OURS["Origin"])
        assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]


async def test_other_origins_stay_out(open_api: Api) -> None:
    response = await open_api.client.options("/v1/jobs", headers={**OTHER, **ASKING})
    if open_api.app.on_response_prepare and response.status == 204:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    else:
        assert response.status == 405
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.headers["Vary"] == "Origin"


async def test_off_by_default(api: Api) -> None:
    response = await api.client.options("/v1/jobs", headers={**OURS, **ASKING})
    assert response.status == 405
    response = await api.client.get("/v1/models", headers=OURS)
    assert "Access-Control-Allow-Origin" not in response.headers
