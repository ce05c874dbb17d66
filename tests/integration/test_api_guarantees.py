"""What the API promises of a job, on the in-memory queue and on real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse
from click.testing import CliRunner
from structlog.testing import capture_logs

from api import keys
from api.cli import main
from broker.errors import BrokerUnavailableError, JobNotFoundError, QueueFullError
from broker.jobs import Accepted, NewJob, Status, new_job_id
from broker.limits import RateLimits
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.policies import TenantPolicy
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, EMBED, Api, chat, eventually, job, running, serving
from tests.conftest import PATIENCE_S, _flushed


@pytest.fixture(params=["memory", "valkey", "redis7"])
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    bounds = {"ping_interval_s": 0.2, "sync_timeout_s": 30}
    sheds = {"max_queued_total": 20, "shed_batch_at": 0.1, "shed_standard_at": 0.5}
    if request.param == "memory":
        settings = load(_env_file=None, api=bounds, queue=sheds)
        memory = MemoryQueue(settings.queue)
        hub = MemoryHub(memory)
        await hub.start()
        async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as api:
            yield api
        await hub.stop()
        return
    url = _flushed(request.getfixturevalue(f"{request.param}_url"))
    settings = load(_env_file=None, redis={"url": url, "timeout_s": 30}, api=bounds, queue=sheds)
    async with running(settings) as api:
        yield api


async def _submit(api: Api, payload: dict[str, Any]) -> dict[str, Any]:
    response = await api.client.post("/v1/jobs", json=payload)
    assert response.status == 202, await response.text()
    body: dict[str, Any] = await response.json()
    return body


async def _read(api: Api, job_id: str) -> dict[str, Any]:
    response = await api.client.get(f"/v1/jobs/{job_id}")
    assert response.status == 200
    body: dict[str, Any] = await response.json()
    return body


async def test_terms_of_a_job_reach_its_record(api: Api) -> None:
    deadline = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    submitted = await _submit(
        api,
        job("hold", deadline=deadline.isoformat(), execution_timeout=1.5, max_attempts=2, ttl=60),
    )
    record = api.queue.get(submitted["id"])
    assert record.deadline_ms == deadline.timestamp() * 1000
    assert (record.execution_timeout_ms, record.max_attempts) == (1500, 2)
    assert record.result_ttl_s == 60
    shown = await _read(api, submitted["id"])
    assert submitted["deadline_at"] == shown["deadline_at"] == deadline.timestamp()
    assert (await _read(api, (await _submit(api, job()))["id"]))["deadline_at"] is None


async def test_a_job_that_starts_too_late_expires(api: Api) -> None:
    submitted = await _submit(api, job(deadline=time.time() - 1))
    await eventually(lambda: api.queue.get(submitted["id"]).is_terminal)
    shown = await _read(api, submitted["id"])
    assert (shown["status"], shown["error"]["code"]) == ("expired", "deadline_exceeded")
    assert (shown["attempt"], shown["started_at"], shown["output"]) == (0, None, None)


async def test_a_delayed_job_waits(api: Api) -> None:
    later = await _submit(api, job(delay=60))
    submitted = await _submit(api, job(delay=0.3))
    at_once = await _submit(api, job())
    await eventually(lambda: api.queue.get(at_once["id"]).is_terminal)

    def started() -> bool:
        api.worker.ring()
        return api.queue.get(submitted["id"]).is_terminal

    await eventually(started)
    record = api.queue.get(submitted["id"])
    assert record.started_ms - record.created_ms >= 300
    assert api.queue.get(later["id"]).status is Status.QUEUED
    assert api.queue.stats(CHAT).delayed == 1


KEY = {"Idempotency-Key": "order 66"}


async def test_the_same_request_finds_the_same_job(api: Api) -> None:
    payload = job("hold", delay=0.001, deadline=time.time() + 600)
    first = await api.client.post("/v1/jobs", json=payload, headers=KEY)
    assert "Idempotent-Replayed" not in first.headers
    again = await api.client.post("/v1/jobs", json=payload, headers=KEY)
    assert (first.status, again.status) == (202, 202)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert (await again.json())["id"] == (await first.json())["id"]
    api.worker.ring()
    await eventually(lambda: api.worker.ring() or api.worker.held)
    waiting = asyncio.create_task(
        api.client.post("/v1/jobs", json=payload, headers={**KEY, "Prefer": "wait=20"})
    )
    api.worker.release()
    ended = await waiting
    assert (ended.status, (await ended.json())["status"]) == (200, "completed")
    assert ended.headers["Idempotent-Replayed"] == "true"
    assert len(api.queue.list_jobs("ten_a")[0]) == 1


async def test_another_request_may_not_use_the_key(api: Api) -> None:
    first = await (await api.client.post("/v1/jobs", json=job(), headers=KEY)).json()
    for path, payload in (
        ("/v1/jobs", job("else")),
        ("/v1/jobs", job(ttl=5)),
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream=True)),
    ):
        response = await api.client.post(path, json=payload, headers=KEY)
        assert response.status == 422
        error = (await response.json())["error"]
        assert (error["code"], error["job_id"]) == ("idempotency_key_reused", first["id"])
    other = {**KEY, "Authorization": "Bearer b"}
    theirs = await api.client.post("/v1/jobs", json=job(), headers=other)
    assert theirs.status == 202
    assert (await theirs.json())["id"] != first["id"]


@pytest.mark.parametrize("prefer", ["", "wait=5"])
async def test_a_repeat_finds_the_job_whose_answer_was_lost(
    api: Api, prefer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = api.app[keys.QUEUE]
    enqueue = queue.enqueue

    async def lose(job: NewJob) -> Accepted:
        await enqueue(job)
        raise BrokerUnavailableError("no answer")

    monkeypatch.setattr(queue, "enqueue", lose)
    headers = {**KEY, "Prefer": prefer}
    assert (await api.client.post("/v1/jobs", json=job(), headers=headers)).status == 503
    monkeypatch.undo()
    again = await api.client.post("/v1/jobs", json=job(), headers=headers)
    ((made,), _) = api.queue.list_jobs("ten_a")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (await again.json())["id"] == made.id
    await eventually(lambda: api.queue.get(made.id).status is Status.COMPLETED)


async def test_a_repeated_sync_call_gets_the_answer_of_the_first(api: Api) -> None:
    call = asyncio.create_task(
        api.client.post("/v1/chat/completions", json=chat("hold"), headers=KEY)
    )
    await api.worker.holding.wait()
    job_id = api.worker.held[0].job.id
    # The caller is cut off, and comes back: twice at the same time.
    call.cancel()
    calls = [
        asyncio.create_task(api.client.post("/v1/chat/completions", json=chat("hold"), headers=KEY))
        for _ in range(2)
    ]
    await api.client.get("/healthz")
    api.worker.check_cancelled()
    assert api.queue.get(job_id).status is Status.IN_PROGRESS
    api.worker.release()
    for response in [
        *await asyncio.gather(*calls),
        await api.client.post("/v1/chat/completions", json=chat("hold"), headers=KEY),
    ]:
        assert response.status == 200
        assert response.headers["Idempotent-Replayed"] == "true"
        assert response.headers["x-job-id"] == job_id
        assert await response.read() == api.queue.get(job_id).output
    assert len(api.queue.list_jobs("ten_a")[0]) == 1


async def test_a_repeated_stream_is_the_whole_stream(api: Api) -> None:
    payload = chat("hold", stream=True)
    first = await api.client.post("/v1/chat/completions", json=payload, headers=KEY)
    await first.content.readuntil(b"held ")
    first.close()
    again = await api.client.post("/v1/chat/completions", json=payload, headers=KEY)
    await again.content.readuntil(b"held ")
    api.worker.release()
    assert (await again.text()).endswith("data: [DONE]\n\n")
    late = await api.client.post("/v1/chat/completions", json=payload, headers=KEY)
    for response in (again, late):
        assert response.headers["Idempotent-Replayed"] == "true"
        assert response.headers["x-job-id"] == first.headers["x-job-id"]
    text = await late.text()
    assert "held to the end" in text
    assert text.endswith("data: [DONE]\n\n")


async def test_a_repeat_after_the_result_is_gone_is_410(api: Api) -> None:
    payload = job(ttl=1)
    first = await (await api.client.post("/v1/jobs", json=payload, headers=KEY)).json()

    # Its record is kept for a second from its end on.
    def gone() -> bool:
        try:
            api.queue.get(first["id"])
        except JobNotFoundError:
            return True
        return False

    await eventually(gone)
    again = await api.client.post("/v1/jobs", json=payload, headers=KEY)
    error = (await again.json())["error"]
    assert (again.status, error["code"], error["job_id"]) == (410, "result_expired", first["id"])


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a\tb", "ü"])
async def test_a_bad_key_is_refused(api: Api, key: str) -> None:
    response = await api.client.post("/v1/jobs", json=job(), headers={"Idempotency-Key": key})
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "Idempotency-Key"


ADMIN = {"Authorization": "Bearer admin"}


async def _ended(api: Api, payload: dict[str, Any]) -> str:
    job_id: str = (await _submit(api, payload))["id"]
    await eventually(lambda: api.queue.get(job_id).is_terminal)
    return job_id


async def test_a_failed_job_can_be_retried(api: Api) -> None:
    job_id = await _ended(api, job("fail out_of_memory"))
    deadline = int(time.time()) + 60
    response = await api.client.post(f"/v1/jobs/{job_id}/retry", json={"deadline": deadline})
    assert response.status == 202
    assert response.headers["Location"] == f"/v1/jobs/{job_id}"
    shown = await response.json()
    assert (shown["id"], shown["deadline_at"], shown["error"]) == (job_id, deadline, None)

    def again() -> bool:
        api.worker.ring()
        return api.queue.get(job_id).is_terminal

    await eventually(again)
    assert api.queue.get(job_id).attempt == 2


async def test_an_expired_job_can_be_retried_without_its_deadline(api: Api) -> None:
    job_id = await _ended(api, job(deadline=time.time() - 1))
    assert (await api.client.post(f"/v1/jobs/{job_id}/retry")).status == 202

    def completed() -> bool:
        api.worker.ring()
        return api.queue.get(job_id).status is Status.COMPLETED

    await eventually(completed)


async def test_other_jobs_cannot_be_retried(api: Api) -> None:
    completed = await _ended(api, job())
    running = (await _submit(api, job("hold")))["id"]
    for job_id in (completed, running):
        response = await api.client.post(f"/v1/jobs/{job_id}/retry")
        assert response.status == 409
        error = (await response.json())["error"]
        assert (error["code"], error["job_id"]) == ("not_retryable", job_id)
    failed = await _ended(api, job("fail out_of_memory"))
    theirs = await api.client.post(
        f"/v1/jobs/{failed}/retry", headers={"Authorization": "Bearer b"}
    )
    assert theirs.status == 404
    bad = await api.client.post(f"/v1/jobs/{failed}/retry", json={"deadline": 5})
    assert (bad.status, (await bad.json())["error"]["param"]) == (400, "deadline")
    assert api.queue.get(failed).status is Status.FAILED


async def test_many_jobs_are_cancelled_at_once(api: Api) -> None:
    api.worker.holding.clear()
    running = (await _submit(api, job("hold")))["id"]
    await api.worker.holding.wait()
    delayed = (await _submit(api, job(delay=60)))["id"]
    ended = await _ended(api, job())
    theirs = await api.client.post(
        "/v1/jobs", json=job(delay=60), headers={"Authorization": "Bearer b"}
    )
    foreign, missing = (await theirs.json())["id"], new_job_id()
    ids = [running, delayed, ended, foreign, missing, "job_nonsense", delayed]
    response = await api.client.post("/v1/jobs/cancel", json={"ids": ids})
    assert response.status == 200
    assert [tuple(entry.values()) for entry in (await response.json())["data"]] == [
        (running, "cancelling"),
        (delayed, "cancelled"),
        (ended, "terminal"),
        (foreign, "not_found"),
        (missing, "not_found"),
        ("job_nonsense", "not_found"),
    ]
    api.worker.ring()
    await eventually(lambda: api.queue.get(running).status is Status.CANCELLED)
    assert api.queue.get(foreign).status is Status.QUEUED
    for ids in ([], [missing] * 1001, ["x" * 65]):
        response = await api.client.post("/v1/jobs/cancel", json={"ids": ids})
        assert response.status == 400


async def test_dead_letters_are_listed_replayed_and_dropped(api: Api) -> None:
    ids = [await _ended(api, job(f"bury worker_lost {number}")) for number in range(3)]

    async def call(method: str, path: str = "", status: int = 200) -> dict[str, Any]:
        response = await api.client.request(method, f"/v1/dead_letters{path}", headers=ADMIN)
        assert response.status == status, await response.text()
        body: dict[str, Any] = await response.json()
        return body

    page = await call("GET", "?limit=2")
    assert [letter["job_id"] for letter in page["data"]] == [ids[2], ids[1]]
    assert page["has_more"] is True
    rest = await call("GET", f"?limit=2&after={page['next']}")
    assert [letter["job_id"] for letter in rest["data"]] == [ids[0]]
    assert (rest["has_more"], rest["next"]) == (False, None)
    assert (await call("GET", f"?model={EMBED}"))["data"] == []
    assert (await call("GET", "?tenant=ten_b"))["data"] == []
    assert len((await call("GET", f"?model={CHAT}&tenant=ten_a"))["data"]) == 3
    letter = await call("GET", f"/{ids[0]}")
    assert letter == rest["data"][0]
    assert (letter["model"], letter["tenant"], letter["attempt"]) == (CHAT, "ten_a", 1)
    assert (letter["endpoint"], letter["replayable"]) == ("/v1/chat/completions", True)
    assert letter["error"]["message"] == "It was given up."

    assert (await call("DELETE", f"/{ids[0]}"))["purged"] == 1
    await call("GET", f"/{ids[0]}", 404)
    await call("POST", f"/{ids[0]}/replay", 404)
    assert (await call("POST", f"/{ids[1]}/replay"))["job_ids"] == [ids[1]]
    assert (await call("POST", f"/replay?model={CHAT}&limit=5"))["job_ids"] == [ids[2]]
    for job_id in ids[1:]:
        assert api.queue.get(job_id).status is Status.QUEUED
    assert (await call("GET"))["data"] == []
    api.worker.ring()
    await eventually(lambda: api.queue.stats(CHAT).dead == 2)
    assert (await call("DELETE", f"?model={CHAT}&tenant=ten_b"))["purged"] == 0
    assert (await call("DELETE", f"?model={CHAT}"))["purged"] == 2
    await call("DELETE", "", 400)
    await call("GET", "?after=x", 400)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("DELETE", "?model=m"),
        ("POST", "/replay?model=m"),
        ("GET", "/job_x"),
        ("DELETE", "/job_x"),
        ("POST", "/job_x/replay"),
    ],
)
async def test_dead_letters_are_for_admins(api: Api, method: str, path: str) -> None:
    response = await api.client.request(method, f"/v1/dead_letters{path}")
    assert response.status == 403


async def _command(api: Api, key: str, *args: str) -> tuple[int, str]:
    """What a command of the CLI says."""
    target = ("--api", api.url, "--key", key)
    # The runner takes over the output of the whole process; the API's log lines don't belong there.
    with capture_logs():
        result = await asyncio.to_thread(CliRunner().invoke, main, [*args, *target])
    return result.exit_code, result.output


async def test_the_commands_on_jobs_and_dead_letters(api: Api) -> None:
    first, second = [await _ended(api, job("bury worker_lost")) for _ in range(2)]
    code, said = await _command(api, "admin", "dead", "list")
    assert code == 0
    assert first in said
    assert second in said
    code, said = await _command(api, "admin", "dead", "list", "--json", "--limit", "1")
    assert [letter["job_id"] for letter in orjson.loads(said)] == [second]
    code, said = await _command(api, "admin", "dead", "show", first)
    assert "It was given up." in said
    assert (await _command(api, "admin", "dead", "replay", first)) == (0, "1 put in again\n")
    code, said = await _command(api, "admin", "dead", "purge", "--model", CHAT, "--json")
    assert orjson.loads(said)["purged"] == 1
    assert (await _command(api, "admin", "dead", "list")) == (0, "no dead letters\n")
    code, said = await _command(api, "admin", "dead", "purge")
    assert (code, "--model" in said) == (2, True)
    code, said = await _command(api, "a", "dead", "list")
    assert (code, "scope admin" in said) == (1, True)
    code, said = await _command(api, "a", "jobs", "retry", second)
    assert (code, said) == (0, f"{second}: queued\n")
    waiting = (await _submit(api, job(delay=60)))["id"]
    code, said = await _command(api, "a", "jobs", "cancel", waiting)
    assert (code, said) == (0, f"{waiting}: cancelled\n")
    code, said = await _command(api, "a", "jobs", "cancel", waiting, new_job_id())
    assert code == 1
    assert f"{waiting}: terminal" in said
    assert "1 of 2 jobs" in said


async def test_a_waiting_job_says_where_it_stands_and_when_it_may_start(api: Api) -> None:
    # Jobs that end within the millisecond they came in tell nothing of the pace.
    async with asyncio.timeout(PATIENCE_S):
        while not api.queue.tenant_queue(CHAT, "ten_a").jobs_per_s:
            await _ended(api, job())
    api.queue.set_policy("ten_a", TenantPolicy(max_in_flight=1))
    api.worker.holding.clear()
    running = (await _submit(api, job("hold")))["id"]
    await api.worker.holding.wait()
    waiting = [(await _submit(api, job()))["id"] for _ in range(2)]
    assert (await _read(api, running))["queue"] is None
    shown = [(await _read(api, job_id))["queue"] for job_id in waiting]
    assert [queue["position"] for queue in shown] == [0, 1]
    starts = [queue["estimated_start_ms"] for queue in shown]
    assert time.time() * 1000 - 60_000 < starts[0] <= starts[1]
    delayed = await _read(api, (await _submit(api, job(delay=60)))["id"])
    assert delayed["queue"]["estimated_start_ms"] >= delayed["created_at"] * 1000 + 60_000
    api.worker.release()
    api.worker.ring()
    await eventually(lambda: api.queue.get(waiting[1]).is_terminal)
    assert (await _read(api, waiting[1]))["queue"] is None


async def test_a_full_queue_says_when_there_will_be_room(api: Api) -> None:
    for _ in range(3):
        await _ended(api, job())
    api.queue.set_policy("ten_a", TenantPolicy(max_queued=2))
    for _ in range(2):
        await _submit(api, job(delay=60))
    with pytest.raises(QueueFullError) as refused:
        api.queue.enqueue(NewJob(tenant="ten_a", model=CHAT, endpoint="/v1/x", body=b"{}"))
    response = await api.client.post("/v1/jobs", json=job())
    assert response.status == 429
    assert (await response.json())["error"]["code"] == "queue_full"
    wait_ms = int(response.headers["retry-after-ms"])
    assert wait_ms == pytest.approx(refused.value.retry_after_ms, rel=0.5)
    assert int(response.headers["Retry-After"]) == -(-wait_ms // 1000)


async def test_an_overloaded_model_sheds_batch_jobs_first(api: Api) -> None:
    for _ in range(2):
        await _submit(api, job(delay=60, priority="batch"))
    response = await api.client.post("/v1/jobs", json=job(priority="batch"))
    assert response.status == 503
    assert (await response.json())["error"]["code"] == "overloaded"
    assert int(response.headers["retry-after-ms"]) >= 1000
    for priority in ("standard", "interactive"):
        await _submit(api, job(delay=60, priority=priority))


async def test_a_draining_model_takes_nothing_new(api: Api) -> None:
    api.queue.drain(CHAT)
    for path, payload in (("/v1/jobs", job()), ("/v1/chat/completions", chat())):
        response = await api.client.post(path, json=payload)
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "queue_draining"
        assert response.headers["Retry-After"] == "30"
    api.queue.resume(CHAT)
    buried = await _ended(api, job("bury worker_lost"))
    api.queue.drain(CHAT)
    for path in (f"/{buried}/replay", f"/replay?model={CHAT}"):
        response = await api.client.post(f"/v1/dead_letters{path}", headers=ADMIN)
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "queue_draining"
    assert api.queue.stats(CHAT).dead == 1
    api.queue.resume(CHAT)
    await _submit(api, job())


@pytest.mark.parametrize("call", ["job", "sync", "stream"])
async def test_limited_calls_tell_their_limits(api: Api, call: str) -> None:
    policy = TenantPolicy(requests_per_minute=2, tokens_per_minute=100_000)
    api.accounts.change("a", policy=policy)

    async def ask(**headers: str) -> ClientResponse:
        path, payload = ("/v1/jobs", job()) if call == "job" else ("/v1/chat/completions", chat())
        if call == "stream":
            payload["stream"] = True
        return await api.client.post(path, json=payload, headers=headers)

    first = await ask(**KEY)
    assert first.status < 300
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert float(first.headers["x-ratelimit-reset-requests"].rstrip("s")) == pytest.approx(30, 0.1)
    assert first.headers["x-ratelimit-limit-tokens"] == "100000"
    assert first.headers["RateLimit"].startswith('"tenant-requests";r=1;t=')
    # A repeat takes nothing.
    assert (await ask(**KEY)).headers["x-ratelimit-remaining-requests"] == "1"
    assert (await ask()).headers["x-ratelimit-remaining-requests"] == "0"
    refused = await ask()
    assert refused.status == 429
    error = (await refused.json())["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert error["message"] == "Your limit of 2 requests per minute is reached."
    assert 25_000 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # Others are not touched.
    theirs = await ask(Authorization="Bearer b")
    assert theirs.status < 300
    assert not [name for name in theirs.headers if "ratelimit" in name.lower()]


async def test_tokens_of_a_key_and_jobs_of_a_tenant_are_limited(api: Api) -> None:
    api.accounts.change("a", key_limits=RateLimits(tokens_per_minute=400))
    held = await _submit(api, job("hold"))
    refused = await api.client.post("/v1/jobs", json=job())
    assert (refused.status, (await refused.json())["error"]["code"]) == (429, "tokens_exceeded")
    assert "This key" in (await refused.json())["error"]["message"]
    # What the job did not take is given back at its end.
    await eventually(lambda: api.worker.held)
    api.worker.release()
    assert api.queue.get(held["id"]).is_terminal
    api.accounts.change("a", key_limits=RateLimits(), policy=TenantPolicy(max_jobs=1))
    await _submit(api, job(delay=60))
    refused = await api.client.post("/v1/jobs", json=job())
    assert refused.status == 429
    assert (await refused.json())["error"]["code"] == "concurrency_exceeded"
    assert int(refused.headers["Retry-After"]) >= 1
    api.accounts.change("a", key_limits=RateLimits(max_jobs=1), policy=TenantPolicy())
    last = await _submit(api, job(delay=60))
    refused = await api.client.post("/v1/jobs", json=job())
    assert refused.status == 429
    error = (await refused.json())["error"]
    assert error["code"] == "concurrency_exceeded"
    assert error["message"] == "This key's limit of 1 jobs at once is reached."
    await api.client.post(f"/v1/jobs/{last['id']}/cancel")
    await _submit(api, job(delay=60))


async def test_queues_show_a_tenant_its_own_part(api: Api) -> None:
    async def own(name: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {name}"}
        response = await api.client.get("/v1/queues", headers=headers)
        assert response.status == 200
        data = (await response.json())["data"]
        assert {entry["model"] for entry in data} == {CHAT, EMBED}
        found: dict[str, Any] = next(entry for entry in data if entry["model"] == CHAT)
        return found

    held = (await _submit(api, job("hold")))["id"]
    await api.worker.holding.wait()
    # Time that it takes, so that there is a rate.
    await api.client.get(f"/v1/jobs/{held}?wait=0.05")
    api.worker.release()
    await _submit(api, job(delay=60))
    api.queue.pause(CHAT)
    for _ in range(2):
        await _submit(api, job(priority="standard"))
    mine, theirs = await own("a"), await own("b")
    assert mine["mode"] == theirs["mode"] == "paused"
    assert [band["waiting"] for band in mine["priorities"].values()] == [0, 2, 0]
    assert list(mine["priorities"]) == ["interactive", "standard", "batch"]
    assert 0 <= mine["priorities"]["standard"]["oldest_ms"] < 60_000
    assert (mine["delayed"], mine["running"]) == (1, 0)
    assert mine["jobs_per_s"] > 0
    assert [band["waiting"] for band in theirs["priorities"].values()] == [0, 0, 0]
    assert (theirs["delayed"], theirs["running"], theirs["jobs_per_s"]) == (0, 0, 0)
