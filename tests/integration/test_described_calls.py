"""The reference holds: every example runs, every answer is as described, ids are their tenant's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import TypeAdapter

from api.accounts.webhook_service import open_webhooks
from api.files.ids import new_batch_id, new_file_id
from api.reference.call import FORM
from api.reference.calls import CALLS
from api.routes import ROUTES
from api.schemas import answers
from broker.connections import connect_async
from broker.jobs import new_job_id
from broker.webhooks.deliveries import NewDelivery
from broker.webhooks.store import WebhookStore
from config.settings import Settings, load
from tests.apiserver import ALL_KINDS, Api, make_database, running

#: Told by tests that have what it takes: a courier, a dead letter, an admin's key.
ELSEWHERE = {"POST /v1/webhook_endpoints/{endpoint_id}/test"}
ELSEWHERE |= {name for name in CALLS if "/dead_letters" in name or name.endswith(" /metrics")}
#: Fetched by browsers (tests/browser, tests/unit/api/test_console.py, test_reference.py).
PAGES = {"GET /docs/{asset}", "GET /console", "GET /console/{asset}"}


@dataclass
class World:
    """The API, with one of each thing of tenant `a`."""

    api: Api
    #: Parameters of paths.
    made: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    async def call(self, name: str, **options: Any) -> Any:
        """Call it with its example, unless told otherwise, and hold the answer to its model."""
        method, template = name.split()
        call = CALLS[name]
        if call.example is not None and "json" not in options and "data" not in options:
            example = dict(call.example)
            if "input_file_id" in example:
                example["input_file_id"] = self.made["input_file_id"]
            options |= {"data": _form(example)} if call.media == FORM else {"json": example}
        path = template.format(**self.made)
        async with self.api.client.request(method, path, **options) as response:
            body = await response.read()
            assert response.status in call.answers, (name, body)
            model: Any = call.answers[response.status]
            self.called.add(name)
            if model is None or isinstance(model, str):
                if model is not None:
                    assert response.content_type == model, name
                return body
            TypeAdapter(model).validate_json(body)
            return await response.json()


def _form(fields: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData()
    for name, value in fields.items():
        form.add_field(name, value, filename="lines.jsonl" if name == "file" else None)
    return form


@pytest.fixture
def settings(valkey: str, tmp_path: Path) -> Settings:
    return load(
        _env_file=None,
        data_dir=tmp_path,
        redis={"url": valkey},
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        auth={"pepper": "pepper-of-the-tests"},
        # Nobody drives the batch: it is still there to be cancelled.
        batches={"concurrency": 0},
    )


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    make_database(settings)
    async with (
        connect_async(settings.redis) as client,
        open_webhooks(settings, client=client) as webhooks,
        running(settings, storage=True, webhooks=webhooks, models=ALL_KINDS) as api,
    ):
        world = World(api)
        await _make_one_of_each(world, WebhookStore(client, settings.webhooks))
        yield world


async def _make_one_of_each(world: World, deliveries: WebhookStore) -> None:
    """All by the examples."""
    made = world.made
    made["job_id"] = (await world.call("POST /v1/jobs"))["id"]
    made["response_id"] = (await world.call("POST /v1/responses"))["id"]
    made["conversation_id"] = (await world.call("POST /v1/conversations"))["id"]
    items = await world.call("GET /v1/conversations/{conversation_id}/items")
    made["item_id"] = items["data"][0]["id"]
    made["input_file_id"] = made["file_id"] = (await world.call("POST /v1/files"))["id"]
    made["batch_id"] = (await world.call("POST /v1/batches"))["id"]
    endpoint = await world.call("POST /v1/webhook_endpoints")
    made["endpoint_id"] = endpoint["id"]
    delivery = NewDelivery(
        tenant="ten_a",
        url=endpoint["url"],
        event_id="evt_1",
        event_type="job.completed",
        body=b"{}",
        endpoint=endpoint["id"],
    )
    await deliveries.put([], [delivery])
    made["delivery_id"] = delivery.id
    made["model"] = "smollm2-135m"
    made["asset"] = "start.js"


async def test_examples_run_and_answers_are_as_described(world: World) -> None:
    call = world.call
    await call("GET /v1/jobs/{job_id}", params={"wait": "9"})
    await call("GET /v1/jobs")
    await call("POST /v1/chat/completions")
    await call("POST /v1/completions")
    await call("POST /v1/embeddings")
    await call("POST /v1/moderations")
    await call("POST /v1/rerank")
    await call("GET /v1/queues")
    used = await call("GET /v1/usage", params={"hours": "3"})
    assert {each["model"] for each in used["data"]} >= {world.made["model"], "all-minilm-l6-v2"}
    await call("GET /v1/models")
    await call("GET /v1/models/{model}")
    await call("POST /v1/jobs/cancel")
    await call("GET /v1/jobs/{job_id}/events")
    await call("POST /v1/jobs/{job_id}/cancel")
    await call("DELETE /v1/jobs/{job_id}")
    failing = {"model": world.made["model"], "prompt": "fail model_failed"}
    failed = await call("POST /v1/jobs", json={"endpoint": "/v1/completions", "body": failing})
    world.made["job_id"] = failed["id"]
    await call("GET /v1/jobs/{job_id}", params={"wait": "9"})
    await call("POST /v1/jobs/{job_id}/retry")

    asked = {
        "model": world.made["model"],
        "input": "hi",
        "conversation": world.made["conversation_id"],
    }
    await call("POST /v1/responses", json=asked)
    await call("GET /v1/responses/{response_id}")
    await call("GET /v1/responses/{response_id}/input_items")
    await call("POST /v1/responses/{response_id}/cancel")
    await call("DELETE /v1/responses/{response_id}")
    await call("GET /v1/conversations/{conversation_id}")
    await call("POST /v1/conversations/{conversation_id}", json={"metadata": {"a": "b"}})
    items = {"items": [{"role": "user", "content": "x"}]}
    await call("POST /v1/conversations/{conversation_id}/items", json=items)
    await call("GET /v1/conversations/{conversation_id}/items/{item_id}")
    await call("DELETE /v1/conversations/{conversation_id}/items/{item_id}")
    await call("DELETE /v1/conversations/{conversation_id}")

    await call("GET /v1/files")
    await call("GET /v1/files/{file_id}")
    content = await call("GET /v1/files/{file_id}/content")
    part = await call("GET /v1/files/{file_id}/content", headers={"Range": "bytes=1-9"})
    assert part == content[1:10]
    await call("GET /v1/batches")
    await call("GET /v1/batches/{batch_id}")
    await call("POST /v1/batches/{batch_id}/cancel")
    world.made["file_id"] = (await call("POST /v1/files"))["id"]
    await call("DELETE /v1/files/{file_id}")

    await call("GET /v1/webhook_event_types")
    await call("GET /v1/webhook_endpoints")
    await call("GET /v1/webhook_endpoints/{endpoint_id}")
    await call("POST /v1/webhook_endpoints/{endpoint_id}")
    await call("PATCH /v1/webhook_endpoints/{endpoint_id}")
    await call("POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret")
    log = await call("GET /v1/webhook_endpoints/{endpoint_id}/deliveries")
    assert len(log["data"]) == 1
    await call("POST /v1/webhook_deliveries/{delivery_id}/redeliver")
    await call("DELETE /v1/webhook_endpoints/{endpoint_id}")
    world.made["endpoint_id"] = "jobs"
    await call("POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret")

    for name in ("GET /healthz", "GET /readyz", "GET /openapi.json", "GET /docs"):
        await call(name)
    async with world.api.client.get("/v1/jobs/job_x") as missing:
        TypeAdapter(answers.ErrorObject).validate_json(await missing.read())
    assert set(CALLS) - world.called == ELSEWHERE | PAGES


async def test_anothers_id_is_answered_like_a_missing_one(world: World) -> None:
    """Every route that names something of a tenant, made from the table of routes."""
    new = new_job_id().removeprefix("job_")
    missing = {
        "job_id": f"job_{new}",
        "response_id": f"resp_{new}",
        "conversation_id": f"conv_{new}",
        "item_id": world.made["item_id"],
        "file_id": new_file_id(),
        "batch_id": new_batch_id(),
        "endpoint_id": "wep_" + "0" * 20,
        "delivery_id": "whd_" + "0" * 26,
    }
    named = [each for each in ROUTES if "_id}" in each.path and "/dead_letters/" not in each.path]
    assert {name for each in named for name in re.findall(r"{(\w+)}", each.path)} == set(missing)
    for route in named:
        call = CALLS[f"{route.method} {route.path}"]
        body: Any = None
        if route.method in ("POST", "PATCH"):
            body = dict(call.example or {})
            if route.path.endswith("items"):
                body = {"items": [{"role": "user", "content": "x"}]}
        seen = []
        for ids in (world.made, missing):
            async with world.api.client.request(
                route.method,
                route.path.format(**ids),
                headers={"Authorization": "Bearer b", "x-request-id": "same"},
                json=body,
            ) as answer:
                seen.append((answer.status, await answer.read()))
        assert seen[0] == seen[1], route
        assert seen[0][0] == 404, route
    # And all is still there.
    for name in ("job_id", "response_id", "conversation_id", "file_id", "batch_id", "endpoint_id"):
        (own,) = [
            each for each in named if each.method == "GET" and each.path.endswith(f"{{{name}}}")
        ]
        await world.call(f"GET {own.path}")
