"""The durable schedule of deliveries, on Valkey and on Redis 7."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
import pytest

from broker import keys
from broker.webhooks.deliveries import NewDelivery, Try
from broker.webhooks.store import LEASE_SLACK_S
from tests.webhooklab import Lab, lab

URL = "http://127.0.0.1:1/x"
DONE = Try(ms=1, duration_ms=2, status=204)
FAILED = Try(ms=1, duration_ms=2, status=500, error="http_status")


@pytest.fixture
async def small(broker_url: str) -> AsyncIterator[Lab]:
    """Bounds that are soon reached."""
    async with lab(
        broker_url,
        max_in_flight=4,
        max_in_flight_per_endpoint=1,
        max_pending=3,
        log_entries=4,
        timeout_s=10,
    ) as made:
        yield made


def _new(event: str, *, endpoint: str = "wep_a", tenant: str = "acme") -> NewDelivery:
    return NewDelivery(
        tenant=tenant, url=URL, event_id=event, event_type="job.completed", body=b"{}",
        endpoint=endpoint,
    )  # fmt: skip


async def test_events_leave_the_outbox_with_their_deliveries(small: Lab) -> None:
    lines = [orjson.dumps({"n": n}) for n in range(3)]
    await small.client.rpush(keys.WEBHOOK_OUTBOX, *lines)
    first = (await small.store.outbox(2))[:2]
    assert await small.store.put(first, [_new("e1")]) == 1
    assert await small.store.outbox(9) == lines[2:]
    # A second worker that had read the same events changes nothing.
    assert await small.store.put(first, [_new("e2")]) == -1
    assert await small.store.outbox(9) == lines[2:]
    claims, _ = await small.store.claim(9)
    assert [each.event_id for each in claims] == ["e1"]


async def test_a_delivery_is_made_once(small: Lab) -> None:
    assert await small.store.put([], [_new("e1")]) == 1
    assert await small.store.put([], [_new("e1")]) == 0


async def test_one_attempt_at_a_time_and_a_stale_one_changes_nothing(small: Lab) -> None:
    await small.store.put([], [_new("e1")])
    (first,), _ = await small.store.claim(9)
    assert (first.attempt, first.body, first.state) == (1, b"{}", "pending")
    assert await small.store.claim(9) == ([], None)
    await small.pass_time(small.settings.timeout_s + LEASE_SLACK_S + 1)
    (second,), _ = await small.store.claim(9)
    assert (second.id, second.attempt) == (first.id, 2)
    assert await small.store.leased(first.id, 1) is None
    assert (await small.store.leased(first.id, 2)) is not None
    assert await small.store.record(first, DONE, "delivered") == 0
    assert await small.store.record(second, DONE, "delivered") == 1
    assert await small.store.record(second, FAILED, "pending") == 0
    assert (await small.seen(_new("e1"))).state == "delivered"
    assert await small.store.claim(9) == ([], None)
    assert await small.client.hgetall(keys.WEBHOOK_RUNNING) == {}


async def test_a_retry_comes_when_it_is_due(small: Lab) -> None:
    made = _new("e1")
    await small.store.put([], [made])
    (first,), _ = await small.store.claim(9)
    assert await small.store.record(first, FAILED, "pending", delay_s=300) == 1
    claims, next_s = await small.store.claim(9)
    assert claims == []
    assert next_s == pytest.approx(300, abs=2)
    await small.pass_time(301)
    (second,), _ = await small.store.claim(9)
    assert (second.attempt, second.failures) == (2, 1)
    assert second.tries == (FAILED,)


async def test_a_slow_endpoint_holds_up_no_other(small: Lab) -> None:
    slow = [_new(f"e{n}", endpoint="wep_slow", tenant="slow") for n in range(3)]
    await small.store.put([], [*slow, _new("e9", endpoint="wep_b")])
    claims, _ = await small.store.claim(9)
    assert {each.endpoint for each in claims} == {"wep_slow", "wep_b"}
    assert len(claims) == 2
    assert await small.store.claim(9) == ([], None)
    (late,) = [each for each in claims if each.endpoint == "wep_slow"]
    await small.store.record(late, DONE, "delivered")
    (following,), _ = await small.store.claim(9)
    assert following.endpoint == "wep_slow"


async def test_a_tenant_has_half_of_all_and_all_are_bounded(small: Lab) -> None:
    for tenant in ("a", "b", "c"):
        many = [_new("e", endpoint=f"wep_{tenant}{n}", tenant=tenant) for n in range(3)]
        await small.store.put([], many)
    claims, _ = await small.store.claim(9)
    assert len(claims) == 4
    owners = [each.tenant for each in claims]
    assert max(owners.count(tenant) for tenant in "abc") == 2


async def test_what_waits_for_an_endpoint_is_bounded(small: Lab) -> None:
    await small.store.put([], [_new(f"e{n}") for n in range(4)])
    states = [(await small.seen(_new(f"e{n}"))).state for n in range(4)]
    assert states == ["pending"] * 3 + ["discarded"]
    assert (await small.store.backlog())["discarded"] == 1
    # It isn't forgotten: it can be sent when there is room.
    assert await small.store.again(_new("e3").id, "acme")
    assert (await small.seen(_new("e3"))).state == "pending"


async def test_the_log_is_bounded_and_waiting_deliveries_stay(small: Lab) -> None:
    for n in range(4):
        await small.store.put([], [_new(f"e{n}")])
        (claim,), _ = await small.store.claim(1)
        await small.store.record(claim, DONE, "delivered")
    await small.store.put([], [_new("e4"), _new("e5")])
    page, more = await small.store.deliveries("wep_a", limit=2)
    assert ([each.event_id for each in page], more) == (["e5", "e4"], True)
    page, more = await small.store.deliveries("wep_a", after=page[-1].id, limit=2)
    assert ([each.event_id for each in page], more) == (["e3", "e2"], False)
    assert await small.store.delivery(_new("e0").id, "acme") is None
    waiting, _ = await small.store.deliveries("wep_a", limit=9, states=("pending",))
    assert [each.event_id for each in waiting] == ["e5", "e4"]


async def test_ended_deliveries_have_a_time_to_live(small: Lab) -> None:
    made = NewDelivery(
        tenant="acme", url=URL, event_id="e", event_type="job.completed", body=b"{}", keep_s=60
    )
    await small.store.put([], [made])
    key = keys.webhook_delivery(made.id)
    assert await small.client.ttl(key) == -1
    (claim,), _ = await small.store.claim(1)
    await small.store.record(claim, DONE, "delivered")
    assert 0 < await small.client.ttl(key) <= 60
    assert await small.store.again(made.id, "acme")
    assert await small.client.ttl(key) == -1


async def test_another_tenants_delivery_is_none(small: Lab) -> None:
    await small.store.put([], [_new("e1")])
    assert await small.store.delivery(_new("e1").id, "other") is None
    assert not await small.store.again(_new("e1").id, "other")


async def test_a_change_of_the_copy_loses_against_a_newer_one(small: Lab) -> None:
    key = keys.webhook_endpoints("acme")
    assert await small.store.mirror(key, "wep_a", b"", b"1", tenant="acme")
    assert not await small.store.mirror(key, "wep_a", b"", b"2", tenant="acme")
    assert await small.store.endpoints("acme") == {"wep_a": b"1"}
    assert await small.store.tenants() == ["acme"]
    assert await small.store.mirror(key, "wep_a", b"1", b"", tenant="acme")
    assert await small.store.tenants() == []
