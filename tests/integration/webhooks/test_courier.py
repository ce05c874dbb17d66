"""From an event to a receiver: real HTTP on the loopback, real Redis, time that is told to pass."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
import standardwebhooks
from aiohttp import web
from openai import InvalidWebhookSignatureError

from broker import keys
from broker.webhooks import signing
from broker.webhooks.endpoints import Endpoint, JobWebhook, Signing
from broker.webhooks.outbox import OutboxEvent
from tests.webhooklab import KEY, Lab, Receiver, lab, receiving


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


@pytest.fixture
async def here(valkey: str) -> AsyncIterator[Lab]:
    async with lab(valkey, disable_after_s=432_000) as made:
        yield made


def _endpoint(receiver: Receiver, path: str = "/hook", **fields: Any) -> Endpoint:
    values: dict[str, Any] = {"id": "wep_1", "event_types": ("*",), **fields}
    return Endpoint(url=receiver.url + path, **values)


async def _job(
    here: Lab,
    *,
    output: bytes = b'{"text":"hi"}',
    endpoint: str = "/v1/chat/completions",
    body: bytes = b"{}",
    **event: Any,
) -> str:
    """A job that has just completed."""
    job_id = "job_01m87078gkaq486xjy5pjqpvmz"
    record = {
        "seq": 3, "endpoint": endpoint, "model": "llm", "band": "interactive",
        "metadata": b'{"order":"7"}', "created_ms": 1_700_000_000_000, "attempt": 1,
        "started_ms": 1_700_000_001_000, "result_ttl_s": 60, "output": output, "body": body,
        "usage": b'{"input_tokens":2,"output_tokens":3,"cached_tokens":0}',
    }  # fmt: skip
    await here.client.hset(keys.job(job_id), mapping=record)
    line = {"type": "job.completed", "tenant": "acme", "job": job_id, "seq": 3,
            "ms": 1_700_000_002_000, **event}  # fmt: skip
    await here.client.rpush(keys.WEBHOOK_OUTBOX, orjson.dumps(line))
    return job_id


async def test_an_event_arrives_signed_and_thin(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver))
    job_id = await _job(here)
    assert await here.attempt() == ["delivered"]
    (got,) = receiver.got
    secret = signing.shown(signing.secret(KEY, "wep_1", 1))
    event = standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
    assert event == {
        "id": f"evt_{job_id.removeprefix('job_')}_3",
        "object": "event",
        "type": "job.completed",
        "created_at": 1_700_000_002,
        "timestamp": "2023-11-14T22:13:22.000Z",
        "data": {
            "id": job_id,
            "object": "job",
            "status": "completed",
            "endpoint": "/v1/chat/completions",
            "model": "llm",
            "priority": "interactive",
            "metadata": {"order": "7"},
            "created_at": 1_700_000_000,
            "started_at": 1_700_000_001,
            "completed_at": 1_700_000_002,
            "attempt": 1,
            "error": None,
            "usage": {
                "input_tokens": 2,
                "output_tokens": 3,
                "cached_tokens": 0,
                "total_tokens": 5,
            },
            "urls": {"self": f"/v1/jobs/{job_id}"},
        },
    }
    assert got.headers["webhook-id"] == event["id"]
    assert len(got.body) < 20_000
    assert "Cookie" not in got.headers
    assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"))) <= 64


async def test_the_openai_package_unwraps_it(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver))
    job_id = await _job(here)
    await here.attempt()
    (got,) = receiver.got
    secret = signing.shown(signing.secret(KEY, "wep_1", 1))
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        event: Any = client.webhooks.unwrap(got.body, got.headers)
        assert (event.type, event.object, event.created_at) == (
            "job.completed", "event", 1_700_000_002,
        )  # fmt: skip
        assert event.id == got.headers["webhook-id"]
        data = event.data if isinstance(event.data, dict) else event.data.to_dict()
        assert data["id"] == job_id
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(got.body + b" ", got.headers)


async def test_a_retry_keeps_its_id_and_renews_time_and_signature(
    here: Lab, receiver: Receiver
) -> None:
    receiver.answers["/hook"] = 500
    await here.publish("acme", _endpoint(receiver))
    await _job(here)
    assert await here.attempt() == ["retried"]
    assert await here.attempt() == []
    await here.pass_time(6)
    receiver.answers["/hook"] = 200
    assert await here.attempt() == ["delivered"]
    first, second = receiver.got
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert int(second.headers["webhook-timestamp"]) >= int(first.headers["webhook-timestamp"]) + 6
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]


async def test_the_plan_of_attempts_and_its_end(here: Lab, receiver: Receiver) -> None:
    receiver.answers["/hook"] = 503
    made = await here.put(receiver.url + "/hook")
    waits = []
    while (outcome := await here.attempt()) == ["retried"]:
        waits.append(await here.wait_s(made))
        await here.pass_time(waits[-1] + 1)
    assert outcome == ["failed"]
    plan = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    assert len(waits) == len(plan)
    # What has passed of a wait when it is read is the machine's.
    assert all(
        -3 <= wait - at * 0.9 <= at * 0.2 + 0.5 for wait, at in zip(waits, plan, strict=True)
    )
    seen = await here.seen(made)
    assert (seen.state, len(seen.tries), seen.failures) == ("failed", 10, 10)
    assert {(one.status, one.error) for one in seen.tries} == {(503, "http_status")}


async def test_a_receiver_may_put_it_off(here: Lab, receiver: Receiver) -> None:
    receiver.answers["/hook"] = 429
    receiver.headers["Retry-After"] = "120"
    made = await here.put(receiver.url + "/hook")
    assert await here.attempt() == ["retried"]
    assert await here.wait_s(made) == pytest.approx(120, abs=10)


async def test_both_secrets_sign_during_a_rotation(here: Lab, receiver: Receiver) -> None:
    until = int((here.clock() + 60) * 1000)
    rotated = Signing(version=2, previous_until_ms=until)
    await here.publish("acme", _endpoint(receiver, signing=rotated))
    await here.put(receiver.url, event="evt_1", endpoint="wep_1")
    assert await here.attempt() == ["delivered"]
    await here.pass_time(61)
    await here.put(receiver.url, event="evt_2", endpoint="wep_1")
    assert await here.attempt() == ["delivered"]
    during, after = receiver.got
    assert len(during.headers["webhook-signature"].split()) == 2
    for version in (1, 2):
        secret = signing.shown(signing.secret(KEY, "wep_1", version))
        standardwebhooks.Webhook(secret).verify(during.body, dict(during.headers))
    assert len(after.headers["webhook-signature"].split()) == 1
    old = standardwebhooks.Webhook(signing.shown(signing.secret(KEY, "wep_1", 1)))
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        old.verify(after.body, dict(after.headers))


async def test_redirects_are_failures(here: Lab, receiver: Receiver) -> None:
    receiver.answers["/hook"] = 302
    receiver.headers["Location"] = receiver.url + "/elsewhere"
    made = await here.put(receiver.url + "/hook")
    assert await here.attempt() == ["retried"]
    assert [got.path for got in receiver.got] == ["/hook"]
    assert (await here.seen(made)).tries[0].error == "redirected"


async def test_gone_disables_the_endpoint(here: Lab, receiver: Receiver) -> None:
    receiver.answers["/hook"] = 410
    await here.publish(
        "acme", _endpoint(receiver), _endpoint(receiver, "/other", id="wep_2", event_types=(
            "webhook_endpoint.disabled",))
    )  # fmt: skip
    await _job(here)
    assert await here.attempt() == ["failed"]
    (health,) = await here.store.health(["wep_1"])
    assert (health.reason, health.disabled_ms > 0) == ("gone", True)
    # The other endpoint hears of it, and the disabled one of nothing any more.
    await _job(here, seq=4)
    assert await here.attempt() == ["delivered"]
    assert [got.path for got in receiver.got] == ["/hook", "/other"]
    told = orjson.loads(receiver.got[1].body)
    assert told["type"] == "webhook_endpoint.disabled"
    assert told["data"] == {"id": "wep_1", "object": "webhook_endpoint", "reason": "gone"}


async def test_days_of_failing_disable_an_endpoint_and_a_success_in_between_does_not(
    here: Lab, receiver: Receiver
) -> None:
    receiver.answers["/hook"] = 500
    await here.publish("acme", _endpoint(receiver))

    async def fail(event: str) -> bool:
        await here.put(receiver.url, event=event, endpoint="wep_1")
        await here.attempt()
        return (await here.store.health(["wep_1"]))[0].disabled_ms > 0

    assert not await fail("e1")
    await here.pass_time(4 * 86_400)
    assert not await fail("e2")
    receiver.answers["/hook"] = 200
    assert not await fail("e3")
    receiver.answers["/hook"] = 500
    assert not await fail("e4")
    await here.pass_time(4 * 86_400)
    assert not await fail("e5")
    await here.pass_time(86_400 + 1)
    assert await fail("e6")
    (health,) = await here.store.health(["wep_1"])
    assert health.reason == "failing"
    # What waits for it fails at its turn, without a request.
    count = len(receiver.got)
    await here.pass_time(90_000)
    assert set(await here.attempt()) == {"failed"}
    assert len(receiver.got) == count


async def test_a_single_jobs_webhook(here: Lab, receiver: Receiver) -> None:
    own = JobWebhook(url=receiver.url + "/own", event_types=("job.completed",), include_output=True)
    await _job(here, webhook=own.to_json().decode())
    await _job(here, webhook=own.to_json().decode(), type="job.failed", seq=5)
    assert await here.attempt() == ["delivered"]
    (got,) = receiver.got
    secret = signing.shown(signing.secret(KEY, "jobs:acme", 0))
    event = standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
    assert event["data"]["output"] == {"text": "hi"}
    page, _ = await here.store.deliveries("jobs:acme", limit=9)
    assert [(each.state, each.keep_s) for each in page] == [("delivered", 60)]


async def test_an_output_that_is_too_large_is_left_out(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver, include_output=True))
    await _job(here, output=orjson.dumps({"text": "x" * 20_000}))
    assert await here.attempt() == ["delivered"]
    data = orjson.loads(receiver.got[0].body)["data"]
    assert data["output_omitted"] is True
    assert "output" not in data


async def test_the_output_of_a_response_is_left_to_the_api(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver, include_output=True))
    await _job(here, endpoint="/v1/responses")
    assert await here.attempt() == ["delivered"]
    data = orjson.loads(receiver.got[0].body)["data"]
    assert data["output_omitted"] is True
    assert "output" not in data


@pytest.mark.parametrize(
    ("ended", "finish", "kind"),
    [
        ("completed", "stop", "response.completed"),
        ("completed", "length", "response.incomplete"),
        ("failed", "", "response.failed"),
        ("expired", "", "response.failed"),
        ("cancelled", "", "response.cancelled"),
    ],
)
async def test_a_background_response_is_told_of_as_openai_does(
    here: Lab, receiver: Receiver, ended: str, finish: str, kind: str
) -> None:
    types = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
    await here.publish(
        "acme",
        _endpoint(receiver, "/responses", event_types=types),
        _endpoint(receiver, "/all", id="wep_2"),
        _endpoint(receiver, "/jobs", id="wep_3", event_types=("job.completed",)),
    )
    output = orjson.dumps({"choices": [{"finish_reason": finish}]}) if finish else b""
    job_id = await _job(
        here, endpoint="/v1/responses", output=output, body=b'{"response":{"background":true}}',
        type=f"job.{ended}",
    )  # fmt: skip
    assert set(await here.attempt()) == {"delivered"}
    told = [got for got in receiver.got if got.path == "/responses"]
    secret = signing.shown(signing.secret(KEY, "wep_1", 1))
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        (event,) = [client.webhooks.unwrap(got.body, got.headers) for got in told]
    assert type(event).__name__ == "".join(map(str.title, kind.split("."))) + "WebhookEvent"
    assert event.data.to_dict() == {"id": "resp_" + job_id.removeprefix("job_")}
    by_all = [orjson.loads(got.body) for got in receiver.got if got.path == "/all"]
    assert {each["type"] for each in by_all} == {f"job.{ended}", kind}
    assert len({each["id"] for each in by_all}) == 2
    assert len(receiver.got) == 3 + (ended == "completed")


@pytest.mark.parametrize(
    "record", [{"body": b'{"response":{"background":false}}'}, {"endpoint": "/v1/completions"}]
)
async def test_other_jobs_are_no_responses(
    here: Lab, receiver: Receiver, record: dict[str, Any]
) -> None:
    await here.publish("acme", _endpoint(receiver, event_types=("response.completed",)))
    background = b'{"response":{"background":true}}'
    await _job(here, **{"endpoint": "/v1/responses", "body": background, **record})
    assert await here.attempt() == []
    assert await here.store.outbox(9) == []


async def test_an_erased_response_is_not_told_of(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver, event_types=("response.cancelled",)))
    job_id = await _job(here, endpoint="/v1/responses", type="job.cancelled")
    await here.client.hdel(keys.job(job_id), "body", "output")
    assert await here.attempt() == []


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
async def test_the_end_of_a_batch(here: Lab, receiver: Receiver, status: str) -> None:
    await here.publish("acme", _endpoint(receiver, event_types=(f"batch.{status}",)))
    event = OutboxEvent(
        type=f"batch.{status}", tenant="acme", batch="batch_1", ms=1_700_000_002_000
    )
    # Told twice, it is still one.
    await here.client.rpush(keys.WEBHOOK_OUTBOX, event.to_json(), event.to_json())
    assert await here.attempt() == ["delivered"]
    (got,) = receiver.got
    secret = signing.shown(signing.secret(KEY, "wep_1", 1))
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        told: Any = client.webhooks.unwrap(got.body, got.headers)
    assert type(told).__name__ == f"Batch{status.title()}WebhookEvent"
    assert (told.data.to_dict(), told.created_at) == ({"id": "batch_1"}, 1_700_000_002)


async def test_a_record_that_is_gone_still_tells_of_its_end(here: Lab, receiver: Receiver) -> None:
    await here.publish("acme", _endpoint(receiver))
    job_id = await _job(here)
    await here.client.delete(keys.job(job_id))
    assert await here.attempt() == ["delivered"]
    data = orjson.loads(receiver.got[0].body)["data"]
    assert (data["id"], data["status"]) == (job_id, "completed")


async def test_filters_choose_the_endpoints(here: Lab, receiver: Receiver) -> None:
    await here.publish(
        "acme",
        _endpoint(receiver, "/failed", id="wep_1", event_types=("job.failed",)),
        _endpoint(receiver, "/off", id="wep_2", enabled=False),
        _endpoint(receiver, "/some", id="wep_3", event_types=("job.expired", "job.completed")),
    )
    await _job(here)
    assert await here.attempt() == ["delivered"]
    assert [got.path for got in receiver.got] == ["/some"]


async def test_an_unreadable_event_holds_up_no_other(here: Lab, receiver: Receiver) -> None:
    await here.client.rpush(keys.WEBHOOK_OUTBOX, b'{"type":"job.completed","later":1}', b"no json")
    await here.publish("acme", _endpoint(receiver))
    await _job(here)
    assert await here.attempt() == ["delivered"]
    assert await here.store.outbox(9) == []


async def test_receivers_that_misbehave(valkey: str, receiver: Receiver) -> None:
    leave = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await leave.wait()
        return web.Response()

    async def reset(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not leave.is_set():
            await response.write(b"x" * 65_536)
            await asyncio.sleep(0)
        return response

    receiver.answers |= {"/hang": hang, "/reset": reset, "/endless": endless}
    # One of them uses all of its time.
    async with lab(valkey, timeout_s=1.5) as here:
        made = {
            path: await here.put(receiver.url + path, event=f"evt{path}")
            for path in ("/hang", "/reset", "/endless")
        }
        outcomes = await here.attempt()
        leave.set()
        assert sorted(outcomes) == ["delivered", "retried", "retried"]
        errors = {path: (await here.seen(each)).tries[0].error for path, each in made.items()}
    # The head of an answer says all; what follows isn't read.
    assert errors == {"/hang": "timeout", "/reset": "connection_lost", "/endless": ""}


async def test_a_lost_lease_is_sent_again_with_the_same_id(here: Lab, receiver: Receiver) -> None:
    """A worker that dies between the answer and its record."""
    made = await here.put(receiver.url)
    await here.courier.turn()
    (lost,) = here.dispatched
    here.dispatched.clear()
    delivery = await here.store.leased(*lost)
    assert delivery is not None
    await here.courier._sender.send(made.url, delivery.body, {"webhook-id": delivery.event_id})
    await here.pass_time(60)
    assert await here.attempt() == ["delivered"]
    # What it left in Celery's queue finds that its lease is gone.
    here.courier._claimed.clear()
    assert await here.courier.deliver(*lost) == "stale"
    assert [got.headers["webhook-id"] for got in receiver.got] == ["evt_1", "evt_1"]
