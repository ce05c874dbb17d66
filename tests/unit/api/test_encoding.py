"""Moderation, reranking and the embedding's own parameters, on the in-memory queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from api.client import AsyncClient
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import Settings
from tests.apiserver import ALL_KINDS, EMBED, MODERATOR, RERANKER, Api, serving

MATRYOSHKA = "matryoshka"
CATALOGUE = ALL_KINDS | {
    MATRYOSHKA: ALL_KINDS[EMBED].model_copy(update={"name": MATRYOSHKA, "dimensions": (64, 128)})
}


@pytest.fixture
async def judging(settings: Settings) -> AsyncIterator[Api]:
    """With models of all kinds."""
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    queue = AsyncMemoryQueue(memory)
    async with serving(settings, memory, queue, hub, models=CATALOGUE) as running:
        yield running
    await hub.stop()


async def _refused(api: Api, path: str, body: dict[str, Any]) -> tuple[int, str, str, str]:
    async with api.client.post(path, json=body) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], error["param"], error["message"]


async def test_without_a_classifier_the_answer_names_the_setting(api: Api) -> None:
    """`api` runs the shipped catalogue."""
    status, code, param, message = await _refused(api, "/v1/moderations", {"input": "x"})
    assert (status, code, param) == (404, "model_not_found", "model")
    assert "FOREBAY_MODELS__CATALOGUE" in message


async def test_one_of_several_classifiers_must_be_named(judging: Api, settings: Settings) -> None:
    other = CATALOGUE[MODERATOR].model_copy(update={"name": "other"})
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    models = CATALOGUE | {"other": other}
    async with serving(settings, memory, AsyncMemoryQueue(memory), hub, models=models) as api:
        refused = await _refused(api, "/v1/moderations", {"input": "x"})
        assert refused == (400, "invalid_request", "model", "Name one of moderator, other.")
    await hub.stop()


@pytest.mark.parametrize(
    ("path", "change", "code", "param"),
    [
        ("moderations", {"input": []}, "invalid_request", "input"),
        ("moderations", {"input": [""]}, "invalid_request", "input.0"),
        ("moderations", {"input": [1, 2]}, "invalid_request", "input.0"),
        ("moderations", {"input": ["x"] * 2049}, "invalid_request", "input"),
        (
            "moderations",
            {"input": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "unsupported_parameter",
            "input",
        ),
        ("moderations", {"model": RERANKER}, "invalid_request", "model"),
        ("moderations", {"threshold": 1}, "unsupported_parameter", "threshold"),
        ("rerank", {"documents": []}, "invalid_request", "documents"),
        ("rerank", {"documents": ["x"] * 1001}, "invalid_request", "documents"),
        ("rerank", {"documents": [{"title": "x"}]}, "invalid_request", "documents.0"),
        ("rerank", {"query": ""}, "invalid_request", "query"),
        ("rerank", {"top_n": 0}, "invalid_request", "top_n"),
        ("rerank", {"max_tokens_per_doc": 9}, "unsupported_parameter", "max_tokens_per_doc"),
        ("rerank", {"model": MODERATOR}, "invalid_request", "model"),
        ("rerank", {"truncate": "end"}, "invalid_request", "truncate"),
        ("embeddings", {"model": EMBED, "dimensions": 64}, "unsupported_parameter", "dimensions"),
        ("embeddings", {"model": MATRYOSHKA, "dimensions": 65}, "invalid_request", "dimensions"),
        ("embeddings", {"model": MATRYOSHKA, "dimensions": 0}, "invalid_request", "dimensions"),
    ],
)
async def test_bad_requests_are_named(
    judging: Api, path: str, change: dict[str, Any], code: str, param: str
) -> None:
    good: dict[str, Any] = {
        "moderations": {"input": "x"},
        "rerank": {"model": RERANKER, "query": "q", "documents": ["d"]},
        "embeddings": {"input": "x"},
    }[path]
    status, found, named, _ = await _refused(judging, f"/v1/{path}", good | change)
    assert (status, found, named) == (400, code, param)


async def test_what_the_worker_gets(judging: Api) -> None:
    bodies: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "/v1/embeddings": (
            {"model": MATRYOSHKA, "input": "x", "dimensions": 64, "truncate": True},
            {"model": MATRYOSHKA, "input": ["x"], "dimensions": 64, "truncate": True},
        ),
        "/v1/moderations": (
            {"model": MODERATOR, "input": [{"type": "text", "text": "x"}]},
            {"model": MODERATOR, "input": ["x"]},
        ),
        "/v1/rerank": (
            {"model": RERANKER, "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1},
            {"model": RERANKER, "query": "q", "documents": ["a", "b"], "top_n": 1},
        ),
    }
    for endpoint, (sent, kept) in bodies.items():
        submitted = await judging.client.post("/v1/jobs", json={"endpoint": endpoint, "body": sent})
        assert submitted.status == 202, await submitted.text()
        job = judging.queue.get((await submitted.json())["id"])
        assert orjson.loads(job.body) == kept


async def test_a_query_costs_once_for_each_document(judging: Api) -> None:
    async def cost(documents: int) -> int:
        body = {"model": RERANKER, "query": "q" * 4000, "documents": ["d"] * documents}
        submitted = await judging.client.post(
            "/v1/jobs", json={"endpoint": "/v1/rerank", "body": body}
        )
        return judging.queue.get((await submitted.json())["id"]).cost

    assert 9_000 < await cost(10) - await cost(1) < 9_100


async def test_jobs_are_their_tenants(judging: Api) -> None:
    response = await judging.client.post("/v1/moderations", json={"input": "x"})
    path = f"/v1/jobs/{response.headers['x-job-id']}"
    assert (await judging.client.get(path)).status == 200
    foreign = await judging.client.get(path, headers={"Authorization": "Bearer b"})
    assert foreign.status == 404


async def test_the_sdk_has_both(judging: Api) -> None:
    async with AsyncClient(judging.url, "a") as client:
        verdicts = await client.moderate(["good", "bad"])
        assert [verdict["flagged"] for verdict in verdicts] == [False, True]
        ranked = await client.rerank(RERANKER, "q", ["a", "bb"], return_documents=True)
    assert [(each["index"], each["document"]["text"]) for each in ranked] == [(1, "bb"), (0, "a")]
