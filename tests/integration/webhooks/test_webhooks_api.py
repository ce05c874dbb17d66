"""Webhooks as a tenant has them: endpoints, secrets, messages of its jobs, the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import standardwebhooks
from sqlalchemy import text

from api.accounts import schema
from api.accounts.database import make_engine, writing
from api.accounts.webhook_service import WebhookService, open_webhooks
from api.schemas.webhook_answers import WebhookTest
from broker import keys
from broker.connections import connect_async
from broker.webhooks import signing
from broker.webhooks.endpoints import EVENT_TYPES
from config.settings import Settings, load
from tests.apiserver import CHAT, Api, eventually, job, running
from tests.conftest import PATIENCE_S
from tests.webhooklab import Lab, Receiver, lab, receiving

B = {"Authorization": "Bearer b"}
#: One of each kind.
SAMPLES = ("job.failed", "response.incomplete", "batch.expired", "webhook_endpoint.disabled")
PATH = "/v1/webhook_endpoints"


@dataclass
class Stack:
    api: Api
    lab: Lab
    receiver: Receiver
    service: WebhookService

    async def create(self, path: str = "/hook", **fields: Any) -> dict[str, Any]:
        body = {"url": self.receiver.url + path, **fields}
        response = await self.api.client.post(PATH, json=body)
        assert response.status == 200, await response.text()
        made: dict[str, Any] = await response.json()
        return made

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        response = await self.api.client.request(method, path, **options)
        body: dict[str, Any] = await response.json()
        return response.status, body

    async def received(self, count: int = 1) -> None:
        await eventually(lambda: len(self.receiver.got) >= count)


@pytest.fixture
def settings(valkey: str, tmp_path: Path) -> Settings:
    return load(
        _env_file=None,
        redis={"url": valkey},
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        auth={"pepper": "pepper-of-the-tests"},
        webhooks={"allow_loopback": True, "timeout_s": PATIENCE_S, "max_endpoints": 3},
    )


@pytest.fixture
async def stack(settings: Settings) -> AsyncIterator[Stack]:
    """An API with a courier beside it, whose tasks run at once."""
    engine = make_engine(settings.database)
    schema.upgrade(engine)
    tenant = (
        "INSERT INTO tenants (id, name, weight, max_in_flight, max_queued, default_priority,"
        " created_at, updated_at)"
        " VALUES ('{0}', '{0}', 1, 1, 1, 'batch', '2026-01-01', '2026-01-01')"
    )
    with writing(engine) as connection:
        for name in ("ten_a", "ten_b"):
            connection.execute(text(tenant.format(name)))
    engine.dispose()
    url = settings.redis.url.get_secret_value()
    async with (
        receiving() as receiver,
        connect_async(settings.redis) as client,
        open_webhooks(settings, client=client) as service,
        running(settings, webhooks=service) as api,
        lab(url) as here,
    ):
        here.courier._clock = time.time
        here.courier._key = signing.installation_key(settings)
        sending: set[asyncio.Task[Any]] = set()

        async def dispatch(delivery_id: str, attempt: int) -> None:
            sending.add(asyncio.create_task(here.courier.deliver(delivery_id, attempt)))

        here.courier._dispatch = dispatch
        running_courier = asyncio.create_task(here.courier.run())
        yield Stack(api, here, receiver, service)
        while not running_courier.done():
            running_courier.cancel()
            await asyncio.wait([running_courier], timeout=0.1)
        await asyncio.gather(*sending)


async def test_the_life_of_an_endpoint(stack: Stack) -> None:
    made = await stack.create(event_types=["job.completed"], name="orders")
    secret = made.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert (made["object"], made["enabled"], made["name"]) == ("webhook_endpoint", True, "orders")
    path = f"{PATH}/{made['id']}"
    assert await stack.call("GET", path) == (200, made)
    status, page = await stack.call("GET", PATH)
    assert (status, page["data"], page["has_more"]) == (200, [made], False)
    assert secret not in str(page)
    status, changed = await stack.call("POST", path, json={"event_types": ["*"], "enabled": False})
    assert (changed["event_types"], changed["enabled"], changed["name"]) == (["*"], False, "orders")
    assert changed["disabled_reason"] == "owner"
    status, changed = await stack.call("PATCH", path, json={"enabled": True})
    assert (status, changed["enabled"], changed["disabled_reason"]) == (200, True, None)
    status, gone = await stack.call("DELETE", path)
    assert gone == {"id": made["id"], "object": "webhook_endpoint.deleted", "deleted": True}
    assert (await stack.call("GET", path))[0] == 404
    assert await stack.lab.store.endpoints("ten_a") == {}


async def test_a_jobs_end_reaches_the_endpoint_and_is_in_its_log(stack: Stack) -> None:
    made = await stack.create()
    _, submitted = await stack.call("POST", "/v1/jobs", json=job())
    await stack.received()
    (got,) = stack.receiver.got
    event = standardwebhooks.Webhook(made["signing_secret"]).verify(got.body, dict(got.headers))
    assert (event["type"], event["data"]["id"]) == ("job.completed", submitted["id"])
    path = f"{PATH}/{made['id']}/deliveries"

    async def ended() -> dict[str, Any]:
        while True:
            _, page = await stack.call("GET", path)
            if page["data"] and page["data"][0]["state"] == "delivered":
                return page
            await asyncio.sleep(0.01)

    page = await asyncio.wait_for(ended(), PATIENCE_S)
    (delivery,) = page["data"]
    assert (delivery["job_id"], delivery["event_id"]) == (submitted["id"], event["id"])
    assert delivery["attempts"][0]["status_code"] == 204
    _, none = await stack.call("GET", path + "?state=failed")
    assert none["data"] == []
    status, again = await stack.call("POST", f"/v1/webhook_deliveries/{delivery['id']}/redeliver")
    assert (status, again["id"]) == (202, delivery["id"])
    await stack.received(2)
    assert stack.receiver.got[1].headers["webhook-id"] == event["id"]
    assert stack.receiver.got[1].body == got.body


async def test_a_webhook_of_a_single_job(stack: Stack) -> None:
    _, shown = await stack.call("POST", f"{PATH}/jobs/rotate_secret")
    webhook = {"url": stack.receiver.url + "/own", "events": ["job.failed"]}
    await stack.call("POST", "/v1/jobs", json=job(webhook=webhook))
    _, failed = await stack.call(
        "POST", "/v1/jobs", json=job("fail out_of_memory", webhook=webhook)
    )
    await stack.received()
    (got,) = stack.receiver.got
    event = standardwebhooks.Webhook(shown["signing_secret"]).verify(got.body, dict(got.headers))
    assert (event["data"]["id"], event["data"]["error"]["code"]) == (failed["id"], "out_of_memory")
    _, page = await stack.call("GET", f"{PATH}/jobs/deliveries")
    assert [each["job_id"] for each in page["data"]] == [failed["id"]]


async def test_rotation_with_and_without_overlap(stack: Stack) -> None:
    made = await stack.create()
    path = f"{PATH}/{made['id']}/rotate_secret"
    _, second = await stack.call("POST", path)
    assert second["signing_secret"] != made["signing_secret"]
    assert second["previous_secret_until"] > second["created_at"] + 86_000
    await stack.call("POST", "/v1/jobs", json=job())
    await stack.received()
    got = stack.receiver.got[0]
    for secret in (made["signing_secret"], second["signing_secret"]):
        standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
    _, third = await stack.call("POST", path, json={"keep_old_secret_active_for_24_hours": False})
    await stack.call("POST", "/v1/jobs", json=job())
    await stack.received(2)
    got = stack.receiver.got[1]
    standardwebhooks.Webhook(third["signing_secret"]).verify(got.body, dict(got.headers))
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(second["signing_secret"]).verify(got.body, dict(got.headers))


async def test_a_test_message_tells_how_it_was_answered(stack: Stack) -> None:
    made = await stack.create()
    status, tested = await stack.call("POST", f"{PATH}/{made['id']}/test")
    WebhookTest.model_validate(tested)
    assert (status, tested["success"], tested["status_code"]) == (200, True, 204)
    stack.receiver.answers["/hook"] = 500
    status, tested = await stack.call("POST", f"{PATH}/{made['id']}/test", json={})
    assert (tested["success"], tested["status_code"]) == (False, 500)


async def test_any_event_can_be_tried_out(stack: Stack) -> None:
    made = await stack.create(event_types=["job.failed"])
    path = f"{PATH}/{made['id']}/test"
    with openai.OpenAI(api_key="unused", webhook_secret=made["signing_secret"]) as client:
        for number, event_type in enumerate(SAMPLES):
            status, tested = await stack.call("POST", path, json={"event_type": event_type})
            WebhookTest.model_validate(tested)
            assert (status, tested["success"], tested["event_type"]) == (200, True, event_type)
            got = stack.receiver.got[number]
            event: Any = client.webhooks.unwrap(got.body, got.headers)
            assert (event.type, bool(event.data.id)) == (event_type, True)
    for body in ({"event_type": "x"}, {"event_type": "*"}, {"other": 1}, []):
        status, answer = await stack.call("POST", path, json=body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert len(stack.receiver.got) == len(SAMPLES)


async def test_a_background_response_ends_at_its_endpoint(stack: Stack) -> None:
    made = await stack.create(event_types=["response.completed"])
    async with openai.AsyncOpenAI(
        base_url=stack.api.url + "v1", api_key="a", webhook_secret=made["signing_secret"]
    ) as client:
        waited = await client.responses.create(model=CHAT, input="hi")
        assert waited.status == "completed"
        response = await client.responses.create(model=CHAT, input="hi", background=True)
        await stack.received()
        (got,) = stack.receiver.got
        event: Any = client.webhooks.unwrap(got.body, got.headers)
        assert (event.type, event.data.id) == ("response.completed", response.id)
        assert (await client.responses.retrieve(event.data.id)).output_text == "one two three"


async def test_an_endpoint_that_was_gone_can_be_enabled_again(stack: Stack) -> None:
    stack.receiver.answers["/hook"] = 410
    made = await stack.create()
    path = f"{PATH}/{made['id']}"
    await stack.call("POST", f"{path}/test")
    _, seen = await stack.call("GET", path)
    assert (seen["enabled"], seen["disabled_reason"]) == (False, "gone")
    stack.receiver.answers.clear()
    await stack.call("PATCH", path, json={"enabled": True})
    _, tested = await stack.call("POST", f"{path}/test")
    assert tested["success"]


async def test_another_tenants_things_are_not_there(stack: Stack) -> None:
    made = await stack.create()
    await stack.call("POST", f"{PATH}/{made['id']}/test")
    _, page = await stack.call("GET", f"{PATH}/{made['id']}/deliveries")
    delivery = page["data"][0]["id"]
    mine = f"{PATH}/{made['id']}"
    missing = f"{PATH}/wep_00000000000000000000"
    for method, suffix in (
        ("GET", ""), ("POST", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate_secret"),
        ("POST", "/test"), ("GET", "/deliveries"),
    ):  # fmt: skip
        body = {"json": {}} if method in ("POST", "PATCH") else {}
        foreign = await stack.call(method, mine + suffix, headers=B, **body)
        absent = await stack.call(method, missing + suffix, headers=B, **body)
        for _, shown in (foreign, absent):
            shown["error"].pop("request_id")
        assert foreign == absent
        assert foreign[0] == 404
    foreign = await stack.call("POST", f"/v1/webhook_deliveries/{delivery}/redeliver", headers=B)
    assert foreign[0] == 404
    assert (await stack.call("GET", PATH, headers=B))[1]["data"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://u:p@example.com/"}, "url"),
        ({"url": "ftp://example.com/"}, "url"),
        ({"url": "https://example.com/", "event_types": []}, "event_types"),
        ({"url": "https://example.com/", "event_types": ["job.queued"]}, "event_types.0"),
        ({"url": "https://example.com/", "tenant": "ten_b"}, "tenant"),
    ],
)
async def test_what_is_refused_is_named(stack: Stack, body: dict[str, Any], param: str) -> None:
    status, answer = await stack.call("POST", PATH, json=body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert "10.0.0.1" not in str(answer)


async def test_a_jobs_webhook_is_checked_at_once(stack: Stack) -> None:
    for webhook, param in (
        ({"url": "https://169.254.169.254/"}, "webhook.url"),
        ({"url": "https://example.com/", "events": ["job.queued"]}, "webhook.events.0"),
        ({"events": ["job.failed"]}, "webhook.url"),
    ):
        status, answer = await stack.call("POST", "/v1/jobs", json=job(webhook=webhook))
        assert (status, answer["error"]["param"]) == (400, param)


async def test_endpoints_are_bounded(stack: Stack) -> None:
    for _ in range(3):
        await stack.create()
    status, answer = await stack.call("POST", PATH, json={"url": "https://example.com/"})
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    _, first = await stack.call("GET", PATH + "?limit=2")
    assert (len(first["data"]), first["has_more"]) == (2, True)
    _, rest = await stack.call("GET", f"{PATH}?after={first['last_id']}")
    assert (len(rest["data"]), rest["has_more"]) == (1, False)


async def test_the_copy_in_redis_is_put_right(stack: Stack) -> None:
    made = await stack.create()
    await stack.call("POST", f"{PATH}/jobs/rotate_secret")
    right = await stack.lab.store.endpoints("ten_a")
    await stack.lab.client.hset(keys.webhook_endpoints("ten_b"), "wep_old", "{}")
    await stack.lab.client.sadd(keys.WEBHOOK_TENANTS, "ten_b")
    await stack.lab.client.hset(keys.webhook_endpoints("ten_a"), made["id"], "{}")
    await stack.lab.client.delete(keys.WEBHOOK_JOB_SECRETS)
    assert await stack.service._publish() == 3
    assert await stack.lab.store.endpoints("ten_a") == right
    assert await stack.lab.store.endpoints("ten_b") == {}
    assert await stack.service._publish() == 0


async def test_the_openai_package_manages_endpoints(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.api.url + "v1", api_key="a") as client:
        made: Any = await client.webhooks.create(
            event_types=["job.completed"],  # type: ignore[list-item]
            name="sdk",
            url=stack.receiver.url,
        )
        assert made.signing_secret.startswith("whsec_")
        assert [each.id async for each in client.webhooks.list()] == [made.id]
        rotated: Any = await client.webhooks.rotate_secret(made.id)
        assert rotated.signing_secret != made.signing_secret
        assert (await client.webhooks.update(made.id, name="new")).name == "new"
        tested = await client.webhooks.test(made.id, event_type="batch.completed")
        assert (tested.event_type, tested.status_code) == ("batch.completed", 204)
        assert (await client.webhooks.event_types.list()).data == list(EVENT_TYPES)
        assert (await client.webhooks.delete(made.id)).deleted
