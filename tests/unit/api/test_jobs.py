"""The native job calls on the in-memory queue."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from api import keys
from api.handlers import jobs
from broker.errors import BrokerUnavailableError
from broker.jobs import Delta, Status, new_job_id
from tests.apiserver import CHAT, EMBED, Api, chat, eventually, job

#: Headers of the second tenant.
B = {"Authorization": "Bearer b"}


async def _submit(api: Api, payload: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await api.client.post("/v1/jobs", json=payload, headers=headers)
    assert response.status == 202, await response.text()
    body: dict[str, Any] = await response.json()
    return body


async def _held(api: Api, **body: Any) -> str:
    """A running job that waits to be released."""
    api.worker.holding.clear()
    submitted = await _submit(api, job("hold", body=body))
    await api.worker.holding.wait()
    return str(submitted["id"])


def _events(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith("id: "):
            number, name, data = (line.partition(": ")[2] for line in block.split("\n"))
            found.append((int(number), name, orjson.loads(data)))
    return found


async def test_submit_answers_202_with_the_job(api: Api) -> None:
    response = await api.client.post(
        "/v1/jobs", json=job(metadata={"k": "v"}, priority="batch", max_attempts=2, ttl=60)
    )
    assert response.status == 202
    body = await response.json()
    assert response.headers["Location"] == f"/v1/jobs/{body['id']}" == body["urls"]["self"]
    assert response.headers["Retry-After"] == "1"
    assert body["status"] == "queued"
    assert (body["priority"], body["metadata"], body["max_attempts"]) == ("batch", {"k": "v"}, 2)
    assert body["queue"] == {"position": 0, "estimated_start_ms": None}
    record = api.queue.get(body["id"])
    assert (record.tenant, record.key_id, record.result_ttl_s) == ("ten_a", "key_a", 60)
    assert record.cost == len(record.body) // 4 + 256


async def test_the_answer_of_a_submit_has_the_fields_of_a_read(api: Api) -> None:
    submitted = await _submit(api, job("hold"))
    shown = await (await api.client.get(submitted["urls"]["self"])).json()
    assert list(shown) == list(submitted)
    unchanged = (
        "id",
        "object",
        "endpoint",
        "model",
        "priority",
        "metadata",
        "max_attempts",
        "urls",
    )
    assert [shown[name] for name in unchanged] == [submitted[name] for name in unchanged]


async def test_prefer_wait_answers_200_with_the_finished_job(api: Api) -> None:
    response = await api.client.post("/v1/jobs", json=job(), headers={"Prefer": "wait=600"})
    assert response.status == 200
    assert response.headers["Preference-Applied"] == "wait=60"
    body = await response.json()
    assert body["status"] == "completed"
    assert body["output"]["choices"][0]["message"]["content"] == "one two three"
    assert body["usage"]["total_tokens"] == 8
    assert body["expires_at"] - body["completed_at"] == 86_400
    assert int(response.headers["x-queue-ms"]) == body["usage"]["queue_ms"]


async def test_prefer_wait_gives_up_but_the_job_goes_on(api: Api) -> None:
    response = await api.client.post("/v1/jobs", json=job("hold"), headers={"Prefer": "wait=1"})
    assert response.status == 202
    api.worker.release()
    shown = await api.client.get(f"{response.headers['Location']}?wait=5")
    assert (await shown.json())["status"] == "completed"


async def test_a_caller_that_leaves_does_not_cancel_a_background_job(api: Api) -> None:
    call = asyncio.create_task(
        api.client.post("/v1/jobs", json=job("hold"), headers={"Prefer": "wait=30"})
    )
    await api.worker.holding.wait()
    job_id = api.worker.held[0].job.id
    call.cancel()
    # The connection is seen to be lost before the next answer comes.
    await eventually(lambda: call.done())
    await api.client.get("/healthz")
    api.worker.check_cancelled()
    assert api.queue.get(job_id).status is Status.IN_PROGRESS


async def test_a_long_poll_returns_when_the_job_ends(api: Api) -> None:
    job_id = await _held(api)
    poll = asyncio.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30"))
    pending = await api.client.get(f"/v1/jobs/{job_id}")
    assert pending.headers["Retry-After"] == "1"
    assert (await pending.json())["status"] == "in_progress"
    api.worker.release()
    response = await poll
    assert (await response.json())["status"] == "completed"
    assert "Retry-After" not in response.headers


async def test_a_long_poll_ends_with_its_time(api: Api) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}?wait=0.05")
    assert (await response.json())["status"] == "in_progress"


@pytest.mark.parametrize("wait", ["x", "-1", "1e3", "٣"])
async def test_a_wait_that_is_no_number(api: Api, wait: str) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}", params={"wait": wait})
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "wait"


async def test_an_etag_changes_with_the_job(api: Api) -> None:
    job_id = await _held(api)
    first = await api.client.get(f"/v1/jobs/{job_id}")
    known = {"If-None-Match": first.headers["ETag"]}
    again = await api.client.get(f"/v1/jobs/{job_id}", headers=known)
    assert again.status == 304
    assert await again.read() == b""
    assert again.headers["x-request-id"]
    assert again.headers["Retry-After"] == "1"
    for header in ('"other", W/' + first.headers["ETag"], "*"):
        headers = {"If-None-Match": header}
        again = await api.client.get(f"/v1/jobs/{job_id}", headers=headers)
        assert again.status == 304
    api.worker.release()
    changed = await api.client.get(f"/v1/jobs/{job_id}", headers=known)
    assert changed.status == 200
    assert changed.headers["ETag"] != first.headers["ETag"]


async def test_a_long_poll_is_not_prolonged_by_an_absent_queue(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise BrokerUnavailableError("away")

    job_id = await _held(api)
    monkeypatch.setattr(jobs, "RECORD_S", 0.0)
    asked = asyncio.get_running_loop().time()
    poll = asyncio.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=1"))
    # The poll has read the record before it follows the job's events.
    heard = asyncio.Event()
    queue = api.app[keys.QUEUE]
    events = queue.events

    async def hear(*args: Any, **more: Any) -> Any:
        heard.set()
        return await events(*args, **more)

    monkeypatch.setattr(queue, "events", hear, raising=False)
    await heard.wait()
    monkeypatch.setattr(queue, "get", away, raising=False)
    assert (await poll).status == 503
    assert asyncio.get_running_loop().time() - asked < 5


async def test_listing_filters_and_pages(api: Api) -> None:
    ids = []
    for _ in range(3):
        ids.append((await _submit(api, job("hold", priority="batch")))["id"])
        # Jobs of one millisecond come in any order.
        await asyncio.sleep(0.002)
    embedded = await _submit(
        api, {"endpoint": "/v1/embeddings", "body": {"model": EMBED, "input": "a"}}
    )

    async def listed(query: str) -> dict[str, Any]:
        response = await api.client.get(f"/v1/jobs?{query}")
        assert response.status == 200, await response.text()
        page: dict[str, Any] = await response.json()
        return page

    page = await listed("limit=2")
    assert page["object"] == "list"
    assert page["has_more"] is True
    assert [entry["id"] for entry in page["data"]] == [embedded["id"], ids[2]]
    assert (page["first_id"], page["last_id"]) == (embedded["id"], ids[2])
    assert "output" not in page["data"][0]
    rest = await listed(f"limit=2&after={page['last_id']}")
    assert [entry["id"] for entry in rest["data"]] == [ids[1], ids[0]]
    assert rest["has_more"] is False
    assert [e["id"] for e in (await listed("order=asc"))["data"]] == [*ids, embedded["id"]]
    assert [e["id"] for e in (await listed(f"model={EMBED}"))["data"]] == [embedded["id"]]
    assert len((await listed("priority=batch"))["data"]) == 3
    await eventually(lambda: api.queue.get(embedded["id"]).is_terminal)
    assert [e["id"] for e in (await listed("status=completed"))["data"]] == [embedded["id"]]
    assert (await listed("created_after=99999999999"))["data"] == []


@pytest.mark.parametrize("prefer", ["", "wait=5"])
async def test_a_submit_whose_answer_is_lost_leaves_no_job(
    api: Api, prefer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = api.app[keys.QUEUE]
    enqueue = queue.enqueue

    async def lose(job: Any) -> int:
        await enqueue(job)
        raise BrokerUnavailableError("no answer")

    monkeypatch.setattr(queue, "enqueue", lose)
    response = await api.client.post("/v1/jobs", json=job("hold"), headers={"Prefer": prefer})
    # The caller is told to try again; one job is enough.
    assert response.status == 503
    ((made,), _) = api.queue.list_jobs("ten_a")
    await eventually(lambda: api.queue.get(made.id).status is Status.CANCELLED)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("status=done", "status"),
        ("priority=high", "priority"),
        ("order=up", "order"),
        ("after=job_x", "after"),
        ("created_after=-1", "created_after"),
        ("created_after=nan", "created_after"),
        ("frob=1", "frob"),
    ],
)
async def test_a_bad_query_names_its_parameter(api: Api, query: str, param: str) -> None:
    response = await api.client.get(f"/v1/jobs?{query}")
    assert response.status == 400
    assert (await response.json())["error"]["param"] == param


async def test_cancel_of_a_running_job_is_202_then_200(api: Api) -> None:
    job_id = await _held(api)
    response = await api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status == 202
    assert (await response.json())["status"] == "cancelling"
    await eventually(lambda: api.queue.get(job_id).is_terminal)
    again = await api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert again.status == 200
    assert (await again.json())["status"] == "cancelled"


async def test_events_from_the_first_to_the_last(api: Api) -> None:
    job_id = await _held(api, stream=True)
    response = await api.client.get(f"/v1/jobs/{job_id}/events")
    assert response.headers["Content-Type"].startswith("text/event-stream")
    await response.content.readuntil(b"held ")
    api.worker.release()
    text = await response.text()
    whole = _events(await (await api.client.get(f"/v1/jobs/{job_id}/events")).text())
    assert [number for number, _, _ in whole] == list(range(1, len(whole) + 1))
    assert [name for _, name, _ in whole] == [
        "job.queued",
        "job.in_progress",
        "job.delta",
        "job.completed",
    ]
    assert all(data["seq"] == number and data["type"] == name for number, name, data in whole)
    last = whole[-1][2]["job"]
    assert last["output"]["choices"][0]["message"]["content"] == "held to the end"
    assert _events(text)[-1] == whole[-1]


@pytest.mark.parametrize("by", ["header", "query"])
async def test_events_resume_after_a_cursor(api: Api, by: str) -> None:
    job_id = await _held(api, stream=True)
    url = f"/v1/jobs/{job_id}/events"
    headers = {"Last-Event-ID": "2"} if by == "header" else {}
    response = await api.client.get(url + ("?starting_after=2" * (by == "query")), headers=headers)
    await response.content.readuntil(b"held ")
    api.worker.release()
    await response.text()
    rest = await api.client.get(url, headers={"Last-Event-ID": "3"})
    assert [name for _, name, _ in _events(await rest.text())] == ["job.completed"]
    nothing = await api.client.get(url, headers={"Last-Event-ID": "4"})
    assert nothing.status == 204


@pytest.mark.parametrize("cursor", ["x", "-1", "99", "1.5"])
async def test_a_bad_cursor_is_refused(api: Api, cursor: str) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": cursor})
    assert response.status == 400


async def test_a_cursor_that_is_too_old_gets_a_snapshot_then_live_events(api: Api) -> None:
    job_id = await _held(api, stream=True)
    claim = api.worker.held[0]
    for number in range(2000):
        piece = Delta(job_id=job_id, attempt=claim.attempt, text=f"{number} ")
        api.queue.emit(claim.queue, [piece])
    response = await api.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "2"})
    await response.content.readuntil(b"event: job.snapshot\n")
    line = await response.content.readline()
    snapshot = orjson.loads(line.removeprefix(b"data: "))
    assert snapshot["text"] == "held " + "".join(f"{number} " for number in range(2000))
    assert snapshot["status"] == "in_progress"
    assert snapshot["seq"] == api.queue.get(job_id).seq
    api.worker.release()
    ((number, name, _),) = _events(await response.text())
    assert (number, name) == (snapshot["seq"] + 1, "job.completed")


async def test_a_silent_event_stream_pings(api: Api) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}/events")
    await response.content.readuntil(b": ping\n")
    api.worker.release()
    assert "job.completed" in await response.text()


async def test_leaving_an_event_stream_does_not_cancel_the_job(api: Api) -> None:
    job_id = await _held(api, stream=True)
    response = await api.client.get(f"/v1/jobs/{job_id}/events")
    await response.content.readuntil(b"held ")
    response.close()
    await api.client.get("/healthz")
    api.worker.check_cancelled()
    assert api.queue.get(job_id).status is Status.IN_PROGRESS


async def test_a_retried_attempt_is_in_the_event_log(api: Api) -> None:
    submitted = await _submit(api, job("crash", body={"stream": True}))
    events = _events(await (await api.client.get(submitted["urls"]["events"])).text())
    assert [data["attempt"] for _, name, data in events if name == "job.in_progress"] == [1, 2]
    assert "job.requeued" in [name for _, name, _ in events]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}?wait=5"),
        ("GET", "/v1/jobs/{}/events"),
        ("POST", "/v1/jobs/{}/cancel"),
    ],
)
async def test_anothers_job_is_answered_like_a_missing_one(
    api: Api, method: str, path: str
) -> None:
    mine = await _held(api)
    bodies = []
    for job_id in (mine, new_job_id(), "job_short", "x" * 300, mine.upper(), "job_%00"):
        response = await api.client.request(
            method, path.format(job_id), headers={**B, "x-request-id": "same"}
        )
        assert response.status == 404
        bodies.append(await response.read())
    assert len(set(bodies)) == 1
    assert api.queue.get(mine).status is Status.IN_PROGRESS


async def test_a_listing_tells_where_waiting_jobs_stand(api: Api) -> None:
    done = await (await api.client.post("/v1/jobs?wait=9", json=job())).json()
    async with api.client.get(done["urls"]["self"] + "?wait=9") as answer:
        assert (await answer.json())["status"] == "completed"
    api.queue.pause(CHAT)
    made = [(await (await api.client.post("/v1/jobs", json=job())).json())["id"] for _ in range(25)]
    async with api.client.get("/v1/jobs?order=asc&limit=100") as answer:
        page = (await answer.json())["data"]
    assert page[0]["queue"] is None
    told = {each["id"]: each["queue"] and each["queue"]["position"] for each in page[1:]}
    assert set(told) == set(made)
    assert list(told.values()).count(None) == 5
    assert all(told[name] in (None, place) for place, name in enumerate(made))
    api.queue.resume(CHAT)


async def test_a_listing_shows_only_the_callers_jobs(api: Api) -> None:
    await _submit(api, job())
    response = await api.client.get("/v1/jobs", headers=B)
    assert (await response.json())["data"] == []


async def test_events_end_at_once_when_the_server_shuts_down(api: Api) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}/events")
    await response.content.readuntil(b"in_progress")
    poll = asyncio.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30"))
    await api.client.get("/healthz")
    async with asyncio.timeout(15):
        await api.app.shutdown()
        text = await response.text()
        assert (await (await poll).json())["status"] == "in_progress"
    assert "job.completed" not in text
    assert api.queue.get(job_id).status is Status.IN_PROGRESS


async def test_every_kind_of_body_becomes_a_job(api: Api) -> None:
    bodies = {
        "/v1/chat/completions": chat(),
        "/v1/completions": {"model": CHAT, "prompt": [1, 2, 3]},
        "/v1/embeddings": {"model": EMBED, "input": [[1, 2], [3]]},
    }
    for endpoint, body in bodies.items():
        submitted = await _submit(api, {"endpoint": endpoint, "body": body})
        shown = await api.client.get(submitted["urls"]["self"] + "?wait=5")
        assert (await shown.json())["status"] == "completed"
