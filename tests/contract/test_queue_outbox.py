"""A job's end and the word of it come true in one step, in every way a job can end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broker import keys
from broker.jobs import Outcome, Status
from broker.webhooks.endpoints import JobWebhook
from broker.webhooks.outbox import OutboxEvent
from tests.contract.harness import MODEL, Harness

WEBHOOK = JobWebhook(url="https://example.com/hook").to_json()


def outbox(harness: Harness) -> list[OutboxEvent]:
    if harness.client is not None:
        return [
            OutboxEvent.from_json(raw) for raw in harness.client.lrange(keys.WEBHOOK_OUTBOX, 0, -1)
        ]
    return list(_memory(harness).outbox)


def _memory(harness: Harness) -> Any:
    queue: Any = harness.queue
    # Behind the one for event loops stands the same memory.
    inner = vars(queue).get("_queue")
    return queue if inner is None else inner._memory


def give_endpoint(harness: Harness, tenant: str) -> None:
    if harness.client is not None:
        harness.client.hset(keys.webhook_endpoints(tenant), "wep_1", "{}")
    else:
        _memory(harness).webhook_tenants.add(tenant)


def _complete(harness: Harness, job_id: str) -> None:
    assert harness.finish(harness.claim_one())


def _fail(harness: Harness, job_id: str) -> None:
    assert harness.queue.complete(harness.claim_one(), Outcome(status=Status.FAILED))


def _bury(harness: Harness, job_id: str) -> None:
    assert harness.queue.bury(harness.claim_one(), "out_of_memory", "It is too large.")


def _cancel_waiting(harness: Harness, job_id: str) -> None:
    assert harness.queue.cancel(job_id) == "cancelled"


def _lose_cancelled(harness: Harness, job_id: str) -> None:
    harness.claim_one("w1")
    assert harness.queue.cancel(job_id) == "cancelling"
    assert harness.queue.release_owner(MODEL, "w1") == 1


def _lose_the_last_attempt(harness: Harness, job_id: str) -> None:
    harness.claim_one("w1")
    harness.advance(60_000)
    assert harness.claim() == []


def _lose_the_last_attempt_without_claims(harness: Harness, job_id: str) -> None:
    harness.claim_one("w1")
    harness.advance(60_000)
    harness.queue.sweep(MODEL)


def _hand_back_the_last_attempt(harness: Harness, job_id: str) -> None:
    assert harness.queue.requeue(harness.claim_one())


def _expire_at_a_claim(harness: Harness, job_id: str) -> None:
    harness.advance(100_000)
    assert harness.claim() == []


def _expire_at_a_sweep(harness: Harness, job_id: str) -> None:
    harness.advance(100_000)
    harness.queue.sweep(MODEL)


ENDS: dict[Callable[[Harness, str], None], Status] = {
    _complete: Status.COMPLETED,
    _fail: Status.FAILED,
    _bury: Status.FAILED,
    _cancel_waiting: Status.CANCELLED,
    _lose_cancelled: Status.CANCELLED,
    _lose_the_last_attempt: Status.FAILED,
    _lose_the_last_attempt_without_claims: Status.FAILED,
    _hand_back_the_last_attempt: Status.FAILED,
    _expire_at_a_claim: Status.EXPIRED,
    _expire_at_a_sweep: Status.EXPIRED,
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.strip("_"))
def test_every_end_is_told_once(harness: Harness, end: Callable[[Harness, str], None]) -> None:
    job_id = harness.submit(webhook=WEBHOOK, max_attempts=1, deadline_ms=harness.now() + 90_000)
    end(harness, job_id)
    assert harness.status(job_id) is ENDS[end]
    (event,) = outbox(harness)
    assert (event.type, event.job, event.tenant) == (f"job.{ENDS[end]}", job_id, "acme")
    assert event.webhook.encode() == WEBHOOK
    assert event.seq == harness.queue.get(job_id).seq
    assert abs(event.ms - harness.now()) < 200_000


def test_a_tenants_endpoints_hear_of_all_its_jobs(harness: Harness) -> None:
    give_endpoint(harness, "acme")
    harness.submit("acme")
    harness.submit("other")
    for claim in harness.claim(2):
        harness.finish(claim)
    (event,) = outbox(harness)
    assert (event.tenant, event.webhook) == ("acme", "")


def test_without_webhooks_nothing_is_written(harness: Harness) -> None:
    harness.submit()
    harness.finish(harness.claim_one())
    assert outbox(harness) == []
    if harness.client is not None:
        assert list(harness.client.scan_iter("fb:webhook:*")) == []


def test_an_end_that_is_refused_is_not_told(harness: Harness) -> None:
    harness.submit(webhook=WEBHOOK)
    stale = harness.claim_one()
    harness.queue.requeue(stale)
    harness.claim_one()
    assert not harness.finish(stale)
    assert outbox(harness) == []


def test_a_completion_that_is_repeated_is_told_once(harness: Harness) -> None:
    harness.submit(webhook=WEBHOOK)
    claim = harness.claim_one()
    assert harness.finish(claim)
    assert harness.finish(claim)
    assert len(outbox(harness)) == 1


def test_each_life_of_a_job_has_an_event_of_its_own(harness: Harness) -> None:
    job_id = harness.submit(webhook=WEBHOOK)
    harness.queue.complete(harness.claim_one(), Outcome(status=Status.FAILED))
    harness.queue.retry(job_id)
    harness.finish(harness.claim_one())
    first, second = outbox(harness)
    assert (first.type, second.type) == ("job.failed", "job.completed")
    assert first.id != second.id
