"""The OpenAI-compatible calls on the in-memory queue."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from broker.jobs import Status
from broker.memory import MemoryQueue
from broker.policies import TenantPolicy
from tests.apiserver import CHAT, EMBED, Api, chat, eventually


def _data(text: str) -> list[Any]:
    """Payloads of a stream without event names, up to `[DONE]`."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else orjson.loads(line) for line in lines]


async def test_a_chat_is_the_workers_output_untouched(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat())
    assert response.status == 200
    body = await response.json()
    assert body["choices"][0]["message"]["content"] == "one two three"
    assert body["system_fingerprint"] == "simulated"
    job = api.queue.get(response.headers["x-job-id"])
    assert await response.read() == job.output
    assert int(response.headers["x-queue-ms"]) == job.started_ms - job.created_ms
    assert response.headers["x-priority"] == "interactive"
    assert job.request_id == response.headers["x-request-id"]


async def test_a_stream_has_role_text_finish_usage_and_done(api: Api) -> None:
    payload = chat(stream=True, stream_options={"include_usage": True})
    response = await api.client.post("/v1/chat/completions", json=payload)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    first, *texts, finish, usage, done = _data(await response.text())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["usage"] is None
    assert [chunk["choices"][0]["delta"]["content"] for chunk in texts] == ["one ", "two ", "three"]
    assert finish["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert finish["system_fingerprint"] == "simulated"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 8
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in (first, *texts, finish, usage)} == {
        "chatcmpl-" + response.headers["x-job-id"].removeprefix("job_")
    }


async def test_a_text_completion_streams_too(api: Api) -> None:
    payload = {"model": CHAT, "prompt": "hi", "stream": True}
    response = await api.client.post("/v1/completions", json=payload)
    *chunks, done = _data(await response.text())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two three"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert done == "[DONE]"


async def test_embeddings(api: Api) -> None:
    response = await api.client.post("/v1/embeddings", json={"model": EMBED, "input": ["a", "b"]})
    assert [row["index"] for row in (await response.json())["data"]] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [("context_length_exceeded", 400), ("max_attempts", 502), ("out_of_memory", 503)],
)
async def test_a_failed_job_has_the_status_of_its_code(
    api: Api, stream: bool, code: str, status: int
) -> None:
    response = await api.client.post(
        "/v1/chat/completions", json=chat(f"fail {code}", stream=stream)
    )
    assert response.status == status
    error = (await response.json())["error"]
    assert error["code"] == code
    assert error["job_id"].startswith("job_")
    assert ("Retry-After" in response.headers) == (status == 503)
    assert response.headers.get("x-should-retry") == ("false" if status == 502 else None)


async def test_an_unknown_error_of_a_worker_tells_nothing(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat("fail made_up"))
    assert response.status == 500
    error = (await response.json())["error"]
    assert error["code"] == "internal_error"
    assert "asked" not in error["message"]


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


async def test_a_stream_outlives_a_lost_attempt_that_repeats_itself(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat("crash", stream=True))
    *chunks, done = _data(await response.text())
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "one two three"
    assert done == "[DONE]"
    assert api.queue.get(response.headers["x-job-id"]).attempt == 2


async def test_a_stream_ends_when_the_new_attempt_says_something_else(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat("diverge", stream=True))
    *chunks, last = _data(await response.text())
    assert chunks[-1]["choices"][0]["delta"]["content"] == "one "
    assert last["error"]["code"] == "worker_lost"
    assert last["error"]["request_id"] == response.headers["x-request-id"]


async def test_a_cancelled_job_ends_its_stream_with_an_error(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat("hold", stream=True))
    await api.worker.holding.wait()
    await api.client.post(f"/v1/jobs/{response.headers['x-job-id']}/cancel")
    assert _data(await response.text())[-1]["error"]["code"] == "cancelled"


async def test_a_cancelled_job_answers_its_sync_caller(api: Api) -> None:
    call = asyncio.create_task(api.client.post("/v1/chat/completions", json=chat("hold")))
    await api.worker.holding.wait()
    await api.client.post(f"/v1/jobs/{api.worker.held[0].job.id}/cancel")
    response = await call
    assert response.status == 409
    assert response.headers["x-should-retry"] == "false"
    assert (await response.json())["error"]["code"] == "cancelled"


async def test_silence_is_filled_with_pings(api: Api) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat("hold", stream=True))
    await response.content.readuntil(b": ping\n")
    api.worker.release()
    assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_respond_async_makes_a_job_that_outlives_its_caller(api: Api) -> None:
    response = await api.client.post(
        "/v1/chat/completions", json=chat("hold"), headers={"Prefer": "respond-async"}
    )
    assert response.status == 202
    job = await response.json()
    assert response.headers["Location"] == job["urls"]["self"]
    assert response.headers["Preference-Applied"] == "respond-async"
    await api.worker.holding.wait()
    api.worker.release()
    shown = await api.client.get(f"{job['urls']['self']}?wait=5")
    assert (await shown.json())["status"] == "completed"


@pytest.mark.parametrize(
    ("asked", "band", "tier"),
    [
        ({}, "interactive", None),
        ({"service_tier": "auto"}, "interactive", "priority"),
        ({"service_tier": "priority"}, "interactive", "priority"),
        ({"service_tier": "default"}, "standard", "default"),
        ({"service_tier": "flex"}, "batch", "flex"),
        ({"priority": "batch"}, "batch", None),
        ({"priority": "batch", "service_tier": "flex"}, "batch", "flex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_tiers_are_bands_and_echoed(
    api: Api, asked: dict[str, Any], band: str, tier: str | None, stream: bool
) -> None:
    response = await api.client.post("/v1/chat/completions", json=chat(stream=stream, **asked))
    assert response.headers["x-priority"] == band
    job = api.queue.get(response.headers["x-job-id"])
    assert job.band == band
    assert b"service_tier" not in job.body
    assert b"priority" not in job.body
    shown = _data(await response.text())[0] if stream else await response.json()
    assert shown.get("service_tier") == tier


async def test_respond_async_waits_as_long_as_it_is_asked_to(api: Api) -> None:
    response = await api.client.post(
        "/v1/chat/completions", json=chat("hold"), headers={"Prefer": "respond-async, wait=1"}
    )
    assert response.status == 202
    assert response.headers["Preference-Applied"] == "respond-async, wait=1"


async def test_models(api: Api) -> None:
    listed = await (await api.client.get("/v1/models")).json()
    assert {model["id"] for model in listed["data"]} == {CHAT, EMBED}
    assert (await (await api.client.get(f"/v1/models/{CHAT}")).json())["object"] == "model"
    missing = await api.client.get("/v1/models/nothing")
    assert missing.status == 404
    assert (await missing.json())["error"]["code"] == "model_not_found"


async def test_a_full_queue_is_429_and_leaves_nothing(api: Api) -> None:
    assert isinstance(api.queue, MemoryQueue)
    api.queue.set_policy("ten_a", TenantPolicy(max_in_flight=1, max_queued=1))
    hold = {"Prefer": "respond-async"}
    await api.client.post("/v1/chat/completions", json=chat("hold"), headers=hold)
    await api.worker.holding.wait()
    await api.client.post("/v1/chat/completions", json=chat("hold"), headers=hold)
    for path, payload in (
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat()}),
    ):
        response = await api.client.post(path, json=payload)
        assert response.status == 429
        assert (await response.json())["error"]["code"] == "queue_full"
        assert int(response.headers["Retry-After"]) * 1000 == int(
            response.headers["retry-after-ms"]
        )
    listed, _ = api.queue.list_jobs("ten_a")
    assert len(listed) == 2
