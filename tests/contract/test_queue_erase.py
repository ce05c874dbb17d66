"""Erasing a job: content goes, a stub stays, and nothing brings the content back."""

from __future__ import annotations

import pytest

from broker.errors import JobNotFoundError, NotRetryableError
from broker.jobs import STUB_S, Delta, EventType, Outcome, Status, Usage
from tests.contract.harness import MODEL, Harness

SECRETS = {"body": b'{"x":"secret"}', "metadata": b'{"x":"secret"}', "stream": True}


def _is_stub(harness: Harness, job_id: str, status: Status) -> None:
    job = harness.queue.get(job_id, tenant="acme")
    assert (job.status, job.body, job.metadata, job.output) == (status, b"", b"{}", None)
    assert job.erased_ms >= job.created_ms
    assert harness.queue.text(job_id) == ""
    events, _ = harness.queue.events(job_id, after=job.seq - 1)
    assert [(event.type.is_terminal, event.text) for event in events] == [(True, "")]
    if harness.client is not None:
        for key in harness.client.scan_iter("*"):
            assert b"secret" not in (harness.client.dump(key) or b""), key
        assert harness.client.ttl(f"fb:job:{job_id}") > STUB_S - 60


def test_an_ended_job(harness: Harness) -> None:
    job_id = harness.submit(**SECRETS)
    claim = harness.claim_one()
    harness.queue.emit(MODEL, [Delta(job_id=job_id, attempt=1, text="secret")])
    harness.queue.complete(
        claim, Outcome(status=Status.COMPLETED, output=b'"secret"', usage=Usage(output_tokens=3))
    )
    assert harness.queue.erase(job_id, tenant="acme")
    assert harness.queue.erase(job_id), "again"
    _is_stub(harness, job_id, Status.COMPLETED)
    job = harness.queue.get(job_id)
    assert (job.usage.output_tokens, job.model, job.attempt) == (3, MODEL, 1)
    listed, _ = harness.queue.list_jobs("acme")
    assert [each.erased_ms for each in listed] == [job.erased_ms]


def test_a_waiting_job_is_cancelled(harness: Harness) -> None:
    job_id, other = harness.submit(**SECRETS), harness.submit()
    assert harness.queue.erase(job_id)
    _is_stub(harness, job_id, Status.CANCELLED)
    assert harness.claim_one().job.id == other


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.COMPLETED, Status.FAILED])
def test_what_a_running_job_still_brings_is_dropped(harness: Harness, status: Status) -> None:
    job_id = harness.submit(**SECRETS)
    claim = harness.claim_one()
    assert not harness.queue.erase(job_id)
    assert harness.queue.get(job_id).body == b""
    assert harness.queue.renew(MODEL, "w1", [(job_id, 1)]) == {job_id: "cancel"}
    harness.queue.emit(MODEL, [Delta(job_id=job_id, attempt=1, text="secret")])
    if status is Status.FAILED:
        assert harness.queue.bury(claim, "worker_lost", "It broke.")
    else:
        assert harness.queue.complete(claim, Outcome(status=status, output=b'"secret"'))
    _is_stub(harness, job_id, status)
    assert harness.queue.replay_dead(MODEL) == []


def test_an_erased_job_is_not_run_again(harness: Harness) -> None:
    job_id = harness.submit(**SECRETS)
    harness.queue.bury(harness.claim_one(), "worker_lost", "It broke.")
    assert harness.queue.erase(job_id)
    assert harness.queue.dead_letters(MODEL) == ([], False)
    with pytest.raises(NotRetryableError) as refused:
        harness.queue.retry(job_id)
    assert refused.value.status == "erased"
    assert harness.queue.replay_dead(MODEL) == []


def test_of_another_tenant(harness: Harness) -> None:
    job_id = harness.submit(**SECRETS)
    with pytest.raises(JobNotFoundError):
        harness.queue.erase(job_id, tenant="other")
    with pytest.raises(JobNotFoundError):
        harness.queue.erase("job_none")
    assert harness.status(job_id) is Status.QUEUED
    assert [event.type for event in harness.log(job_id)] == [EventType.QUEUED]
