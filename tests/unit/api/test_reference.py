"""The reference: every route described, every example runs, every answer as described."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from api.reference.calls import CALLS, Call
from api.reference.document import openapi
from api.routes import ROUTES, Route
from api.schemas import answers
from broker.jobs import new_job_id
from tests.apiserver import Api

EXAMPLES = {name: call for name, call in CALLS.items() if call.example is not None}


def test_routes_and_descriptions_are_the_same() -> None:
    assert {f"{route.method} {route.path}" for route in ROUTES} == set(CALLS)


def test_a_route_without_a_description_is_refused() -> None:
    new = Route("GET", "/v1/new", ROUTES[0].handler, "jobs")
    with pytest.raises(KeyError, match="GET /v1/new"):
        openapi([*ROUTES, new])


def test_a_body_that_is_read_is_described() -> None:
    """All but those that take nothing: what POSTs a body has a schema and most have an example."""
    for route in ROUTES:
        call = CALLS[f"{route.method} {route.path}"]
        if route.method == "POST" and not route.path.endswith(("/cancel", "/replay")):
            assert call.body is not None, route


def test_the_document_holds_together() -> None:
    document = openapi(ROUTES)
    assert document["openapi"] == "3.1.0"
    text = str(document)
    names = set(re.findall(r"#/components/schemas/([^'\"]+)", text))
    assert names <= set(document["components"]["schemas"])
    ids = [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
    ]
    assert len(ids) == len(set(ids)) == len(ROUTES)
    # The schema of a body is the one it is checked by.
    message = document["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in message["anyOf"]


def _check(call: Call, status: int, body: bytes) -> None:
    model: Any = call.answers[status]
    TypeAdapter(model).validate_json(body)


@pytest.mark.parametrize("name", EXAMPLES)
async def test_every_example_runs(api: Api, name: str) -> None:
    method, path = name.split()
    response = await api.client.request(method, path, json=dict(CALLS[name].example or {}))
    _check(CALLS[name], response.status, await response.read())


async def test_answers_are_as_described(api: Api) -> None:
    """One life of a job, a response and a conversation."""
    made: dict[str, str] = {}

    async def call(name: str, **options: Any) -> Any:
        method, template = name.split()
        response = await api.client.request(method, template.format(**made), **options)
        _check(CALLS[name], response.status, await response.read())
        return await response.json()

    job = await call("POST /v1/jobs", json=dict(EXAMPLES["POST /v1/jobs"].example or {}))
    made["job_id"] = job["id"]
    await call("GET /v1/jobs/{job_id}", params={"wait": "9"})
    await call("GET /v1/jobs")
    await call("POST /v1/jobs/{job_id}/cancel")
    await call("DELETE /v1/jobs/{job_id}")
    await call("GET /v1/queues")
    await call("GET /v1/models")
    made["model"] = "smollm2-135m"
    await call("GET /v1/models/{model}")
    conversation = await call("POST /v1/conversations", json={"metadata": {"a": "b"}})
    made["conversation_id"] = conversation["id"]
    asked = {"model": "smollm2-135m", "input": "hi", "conversation": conversation["id"]}
    response = await call("POST /v1/responses", json=asked)
    made["response_id"] = response["id"]
    await call("GET /v1/responses/{response_id}")
    await call("GET /v1/responses/{response_id}/input_items")
    await call("POST /v1/responses/{response_id}/cancel")
    await call("GET /v1/conversations/{conversation_id}")
    await call("POST /v1/conversations/{conversation_id}", json={"metadata": {}})
    items = [{"role": "user", "content": "x"}]
    added = await call("POST /v1/conversations/{conversation_id}/items", json={"items": items})
    made["item_id"] = added["data"][0]["id"]
    await call("GET /v1/conversations/{conversation_id}/items")
    await call("GET /v1/conversations/{conversation_id}/items/{item_id}")
    await call("DELETE /v1/conversations/{conversation_id}/items/{item_id}")
    await call("DELETE /v1/responses/{response_id}")
    await call("DELETE /v1/conversations/{conversation_id}")
    await call("GET /healthz")
    await call("GET /readyz")
    missing = await api.client.get("/v1/jobs/job_x")
    TypeAdapter(answers.ErrorObject).validate_json(await missing.read())


async def test_the_page_brings_all_it_needs(api: Api) -> None:
    page = await api.client.get("/docs", headers={"Authorization": ""})
    assert page.status == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    files = re.findall(r'(?:src|href)="([^"]+)"', await page.text())
    assert len(files) == 4
    for name in files:
        response = await api.client.get(f"/{name}")
        assert response.status == 200
        assert len(await response.read()) > 100
        assert "://" not in name
    assert (await api.client.get("/docs/..%2F..%2Fsetup.cfg")).status == 404
    assert (await api.client.get("/docs/README.md")).status == 404


WITH_IDS = [
    route for route in ROUTES if "_id}" in route.path and not route.path.startswith("/v1/dead")
]


@pytest.mark.parametrize("route", WITH_IDS, ids=lambda route: f"{route.method} {route.path}")
async def test_anothers_id_is_answered_like_a_missing_one(api: Api, route: Route) -> None:
    """Every route that names something of a tenant, made from the table of routes."""
    job = await api.client.post("/v1/jobs", json={**_example("POST /v1/jobs"), "delay": 60})
    response = await api.client.post("/v1/responses", json=_example("POST /v1/responses"))
    talk = await api.client.post("/v1/conversations", json=_example("POST /v1/conversations"))
    talk_id = (await talk.json())["id"]
    items = await api.client.get(f"/v1/conversations/{talk_id}/items")
    mine = {
        "job_id": (await job.json())["id"],
        "response_id": (await response.json())["id"],
        "conversation_id": talk_id,
        "item_id": (await items.json())["data"][0]["id"],
    }
    new = new_job_id().removeprefix("job_")
    kinds = {"job_id": "job_", "response_id": "resp_", "conversation_id": "conv_"}
    missing = {**mine, **{name: kind + new for name, kind in kinds.items()}}
    body = {"items": [{"role": "user", "content": "x"}]} if route.path.endswith("items") else {}
    answers_ = []
    for ids in (mine, missing):
        answer = await api.client.request(
            route.method,
            route.path.format(**ids),
            headers={"Authorization": "Bearer b", "x-request-id": "same"},
            json=body if route.method == "POST" else None,
        )
        answers_.append((answer.status, await answer.read()))
    assert answers_[0] == answers_[1]
    assert answers_[0][0] == 404


def _example(name: str) -> dict[str, Any]:
    return dict(EXAMPLES[name].example or {})
