"""Deleting a job, jobs that aren't stored, results that are no longer kept."""

from __future__ import annotations

import pytest

from broker.jobs import Status
from broker.memory import MemoryQueue
from tests.apiserver import Api, chat, job

B = {"Authorization": "Bearer b"}


async def _done(api: Api, **changes: object) -> str:
    response = await api.client.post("/v1/jobs", json=job(**changes), headers={"Prefer": "wait=9"})
    assert response.status == 200
    return str((await response.json())["id"])


async def test_an_ended_job_is_erased_and_leaves_a_stub(api: Api) -> None:
    job_id = await _done(api, metadata={"a": "mine"})
    response = await api.client.delete(f"/v1/jobs/{job_id}")
    assert response.status == 200
    assert await response.json() == {"id": job_id, "object": "job.deleted", "deleted": True}
    stub = await (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert (stub["status"], stub["output"], stub["metadata"]) == ("completed", None, {})
    assert stub["erased_at"] >= stub["completed_at"]
    assert stub["expires_at"] is None
    events = await api.client.get(f"/v1/jobs/{job_id}/events")
    assert (events.status, (await events.json())["error"]["code"]) == (410, "result_expired")
    retried = await api.client.post(f"/v1/jobs/{job_id}/retry")
    assert retried.status == 409


async def test_a_running_job_is_stopped_first(api: Api) -> None:
    submitted = await api.client.post("/v1/jobs", json=job("hold"))
    job_id = (await submitted.json())["id"]
    await api.worker.holding.wait()
    assert (await api.client.delete(f"/v1/jobs/{job_id}")).status == 202
    api.worker.check_cancelled()
    assert api.queue.get(job_id).status is Status.CANCELLED
    assert (await api.client.delete(f"/v1/jobs/{job_id}")).status == 200


async def test_anothers_job_is_not_there(api: Api) -> None:
    job_id = await _done(api)
    response = await api.client.delete(f"/v1/jobs/{job_id}", headers=B)
    assert (response.status, (await response.json())["error"]["code"]) == (404, "job_not_found")
    assert api.queue.get(job_id).output is not None


async def test_a_replay_of_an_erased_job_is_410(api: Api) -> None:
    named = {"Idempotency-Key": "k"}
    first = await api.client.post("/v1/chat/completions", json=chat(), headers=named)
    await api.client.delete(f"/v1/jobs/{first.headers['x-job-id']}")
    again = await api.client.post("/v1/chat/completions", json=chat(), headers=named)
    assert (again.status, (await again.json())["error"]["code"]) == (410, "result_expired")


async def test_an_expired_result_is_410_for_its_owner_only(api: Api) -> None:
    job_id = await _done(api, ttl=1)
    assert isinstance(api.queue, MemoryQueue)
    api.queue._records[job_id].expires_ms = 0
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
        response = await api.client.get(path)
        assert (response.status, (await response.json())["error"]["code"]) == (
            410,
            "result_expired",
        )
        assert (await api.client.get(path, headers=B)).status == 404


@pytest.mark.parametrize(
    ("terms", "kept_s"),
    [({"store": False}, 300), ({"store": False, "ttl": 9}, 9), ({"store": True}, 86_400)],
)
async def test_what_is_not_stored_is_kept_shortly(
    api: Api, terms: dict[str, object], kept_s: int
) -> None:
    job_id = await _done(api, **terms)
    assert api.queue.get(job_id).result_ttl_s == kept_s


async def test_what_is_not_stored_shares_no_answer(api: Api) -> None:
    stored = await _done(api)
    assert not api.queue.get(stored).no_store
    assert api.queue.get(await _done(api, store=False)).no_store
    called = await api.client.post(
        "/v1/chat/completions", json=chat(), headers={"Cache-Control": "no-cache, no-store"}
    )
    job_id = called.headers["x-job-id"]
    assert api.queue.get(job_id).no_store


async def test_overhead_is_told_where_the_job_has_ended(api: Api) -> None:
    called = await api.client.post("/v1/chat/completions", json=chat())
    waited = await api.client.post("/v1/jobs", json=job(), headers={"Prefer": "wait=9"})
    for response in (called, waited):
        assert 0 <= int(response.headers["x-overhead-ms"]) < 5_000
        assert int(response.headers["x-queue-ms"]) >= 0
