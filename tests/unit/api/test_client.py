"""The client against a small API of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from api.client import ApiError, AsyncClient, Client, ConnectionFailedError, RemoteJob
from tests.conftest import free_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fake:
    """Answers from a list, in order; remembers what was asked."""

    def __init__(self) -> None:
        self.answers: list[Handler] = []
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        return await self.answers.pop(0)(request)

    def says(self, document: object, status: int = 200, **headers: str) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.json_response(document, status=status, headers=headers)

        self.answers.append(answer)

    def refuses(self, status: int, code: str, **headers: str) -> None:
        error = {"message": "no", "code": code, "param": "model", "request_id": "req_1"}
        self.says({"error": error}, status, **headers)

    def breaks(self) -> None:
        """The connection ends after the request was read."""

        async def answer(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        self.answers.append(answer)

    def streams(self, *chunks: str, breaks: bool = False) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for chunk in chunks:
                await response.write(chunk.encode())
            if breaks:
                assert request.transport is not None
                request.transport.abort()
            return response

        self.answers.append(answer)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
async def client(fake: Fake) -> AsyncIterator[AsyncClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    async with (
        TestServer(app) as server,
        AsyncClient(str(server.make_url("/")), "fb_test_x") as made,
    ):
        yield made


JOB = {"id": "job_1", "status": "queued", "model": "m", "priority": "batch"}


def event(seq: int, kind: str, **data: object) -> str:
    body = json.dumps({"seq": seq, "type": kind, "attempt": 1, **data})
    return f"id: {seq}\nevent: {kind}\ndata: {body}\n\n"


async def test_submit_sends_the_job_and_its_key(client: AsyncClient, fake: Fake) -> None:
    fake.says(JOB, 202)
    job = await client.submit("/v1/x", {"model": "m"}, priority="batch", metadata={"a": "b"})
    assert (job.id, job.status, job.priority) == ("job_1", "queued", "batch")
    assert not job.is_terminal
    (request,) = fake.requests
    assert (request.method, request.path) == ("POST", "/v1/jobs")
    assert request.headers["Authorization"] == "Bearer fb_test_x"
    assert json.loads(fake.bodies[0]) == {
        "endpoint": "/v1/x",
        "body": {"model": "m"},
        "priority": "batch",
        "metadata": {"a": "b"},
    }


async def test_a_refusal_for_now_is_repeated_after_what_was_asked(
    client: AsyncClient, fake: Fake
) -> None:
    fake.refuses(429, "queue_full", **{"Retry-After": "0"})
    fake.refuses(503, "unavailable", **{"Retry-After": "0.3"})
    fake.says(JOB, 202)
    began = time.monotonic()
    assert (await client.submit("/v1/x", {})).id == "job_1"
    assert time.monotonic() - began >= 0.3
    keys = {request.headers["Idempotency-Key"] for request in fake.requests}
    assert len(fake.requests) == 3
    assert len(keys) == 1


async def test_a_refusal_for_good_is_not_repeated(client: AsyncClient, fake: Fake) -> None:
    fake.refuses(400, "invalid_request")
    with pytest.raises(ApiError) as caught:
        await client.submit("/v1/x", {})
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_request", "model")
    assert error.request_id == "req_1"
    assert str(error) == "400 invalid_request: no (model)"
    assert len(fake.requests) == 1


async def test_a_submit_whose_answer_is_missing_is_repeated_with_its_key(
    client: AsyncClient, fake: Fake
) -> None:
    fake.breaks()
    fake.refuses(502, "")
    fake.refuses(504, "")
    fake.says(JOB, 202)
    assert (await client.submit("/v1/x", {}, deadline=1_800_000_000)).id == "job_1"
    assert len(fake.requests) == 4
    assert len({request.headers["Idempotency-Key"] for request in fake.requests}) == 1
    assert len(set(fake.bodies)) == 1
    assert json.loads(fake.bodies[0])["deadline"] == 1_800_000_000
    fake.breaks()
    fake.says({"choices": []})
    await client.post("/v1/chat/completions", {}, idempotency_key="mine")
    assert fake.requests[-1].headers["Idempotency-Key"] == "mine"


@pytest.mark.parametrize("status", [502, 504])
async def test_a_call_without_a_key_that_may_have_been_taken_is_not_repeated(
    client: AsyncClient, fake: Fake, status: int
) -> None:
    fake.refuses(status, "")
    with pytest.raises(ApiError):
        await client.chat("m", [])
    fake.breaks()
    with pytest.raises(ConnectionFailedError, match="may have been"):
        await client.chat("m", [])
    assert len(fake.requests) == 2


async def test_a_call_without_an_answer_in_time_is_not_repeated(fake: Fake) -> None:
    forever = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        await forever.wait()
        return web.Response()

    fake.answers = [silent, silent]
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    async with TestServer(app) as server:
        async with AsyncClient(str(server.make_url("/")), "k", timeout_s=0.2) as client:
            with pytest.raises(ConnectionFailedError, match="may have been"):
                await client.chat("m", [])
        forever.set()
    assert len(fake.requests) == 1


async def test_calls_that_may_be_carried_out_twice_are_repeated(
    client: AsyncClient, fake: Fake
) -> None:
    fake.breaks()
    fake.refuses(502, "")
    fake.says(JOB)
    assert (await client.get("job_1")).id == "job_1"
    fake.breaks()
    fake.refuses(504, "")
    fake.says(JOB)
    assert (await client.cancel("job_1")).id == "job_1"
    assert len(fake.requests) == 6


async def test_a_submit_that_reached_nobody_is_repeated(fake: Fake) -> None:
    """The API comes up between two tries."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    fake.says(JOB, 202)
    port = free_port()
    async with AsyncClient(f"http://127.0.0.1:{port}", "k") as client:
        call = asyncio.create_task(client.submit("/v1/x", {}))
        await asyncio.sleep(0)
        async with TestServer(app, port=port):
            assert (await call).id == "job_1"


async def test_repeats_end(fake: Fake) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    for _ in range(3):
        fake.refuses(503, "unavailable", **{"Retry-After": "0"})
    async with TestServer(app) as server:
        async with AsyncClient(str(server.make_url("/")), "k", max_retries=2) as client:
            with pytest.raises(ApiError):
                await client.get("job_1")
        assert len(fake.requests) == 3


async def test_a_body_that_is_no_error_object_still_becomes_one_line(
    client: AsyncClient, fake: Fake
) -> None:
    fake.says("nonsense", 404)
    with pytest.raises(ApiError, match=r"^404 : Not Found$|^404: Not Found$"):
        await client.get("job_1")


async def test_nobody_listens() -> None:
    async with AsyncClient("http://127.0.0.1:1", "k", max_retries=0) as client:
        with pytest.raises(ConnectionFailedError, match="can't be reached"):
            await client.get("job_1")


async def test_wait_polls_until_the_end(client: AsyncClient, fake: Fake) -> None:
    fake.says(JOB)
    fake.says({**JOB, "status": "in_progress"})
    fake.says({**JOB, "status": "completed", "output": {"x": 1}, "usage": {"queue_ms": 3}})
    job = await client.wait("job_1")
    assert job.is_terminal
    assert job.output == {"x": 1}
    assert [request.query["wait"] for request in fake.requests] == ["30", "30", "30"]


async def test_wait_gives_up(client: AsyncClient, fake: Fake) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(float(request.query["wait"]))
        return web.json_response(JOB)

    fake.answers = [slow] * 5
    with pytest.raises(TimeoutError, match="job_1"):
        await client.wait("job_1", timeout_s=0.1)


async def test_events_come_in_order_and_end(client: AsyncClient, fake: Fake) -> None:
    fake.streams(
        event(1, "job.queued"),
        ": ping\n\n",
        event(2, "job.delta", text="grüß")[:25],
        event(2, "job.delta", text="grüß")[25:],
        event(3, "job.completed"),
    )
    seen = [item async for item in client.events("job_1")]
    assert [(item.seq, item.type) for item in seen] == [
        (1, "job.queued"),
        (2, "job.delta"),
        (3, "job.completed"),
    ]
    assert seen[1].text == "grüß"
    assert seen[-1].is_terminal
    assert "Last-Event-ID" not in fake.requests[0].headers


@pytest.mark.parametrize("breaks", [True, False])
async def test_a_broken_stream_goes_on_after_the_last_event(
    client: AsyncClient, fake: Fake, breaks: bool
) -> None:
    fake.streams(event(1, "job.queued"), event(2, "job.delta", text="a"), breaks=breaks)
    fake.refuses(503, "unavailable")
    fake.streams(event(3, "job.delta", text="b"), event(4, "job.completed"))
    text = "".join([item.text async for item in client.events("job_1")])
    resumed = [request.headers.get("Last-Event-ID") for request in fake.requests]
    # An abort may overtake the last bytes; whatever came is not asked for again.
    assert text in ("ab", "b")
    assert resumed[0] is None
    assert resumed[1] == resumed[2] == ("2" if text == "ab" else resumed[1])


async def test_a_stream_of_a_missing_job_is_an_error(client: AsyncClient, fake: Fake) -> None:
    fake.refuses(404, "job_not_found")
    with pytest.raises(ApiError, match="job_not_found"):
        await anext(client.events("job_1"))


async def test_chat_embed_models_list_and_cancel(client: AsyncClient, fake: Fake) -> None:
    fake.says({"choices": []})
    fake.says({"data": [{"embedding": [1.0, 2.0]}]})
    fake.says({"data": [{"id": "m"}]})
    fake.says({"data": [JOB]})
    fake.says({**JOB, "status": "cancelling"})
    assert await client.chat("m", [{"role": "user", "content": "x"}], max_tokens=3) == {
        "choices": []
    }
    assert json.loads(fake.bodies[0])["max_tokens"] == 3
    assert await client.embed("m", ["a"]) == [[1.0, 2.0]]
    assert await client.models() == [{"id": "m"}]
    assert [job.id for job in await client.list_jobs(status="queued", model=None)] == ["job_1"]
    assert dict(fake.requests[3].query) == {"limit": "20", "status": "queued"}
    assert (await client.cancel("job_1")).status == "cancelling"
    assert fake.requests[4].path == "/v1/jobs/job_1/cancel"


def test_a_job_object_may_lack_what_is_not_known_yet() -> None:
    job = RemoteJob.from_json({"id": "job_1", "status": "failed", "usage": None})
    assert job.usage == {}
    assert job.is_terminal


async def test_events_that_come_again_after_a_resume_are_left_out(
    client: AsyncClient, fake: Fake
) -> None:
    fake.streams(event(1, "job.queued"), event(2, "job.delta", text="a"))
    fake.streams(event(2, "job.delta", text="a"), event(3, "job.completed", job=JOB))
    seen = [item async for item in client.events("job_1")]
    assert [item.seq for item in seen] == [1, 2, 3]
    assert fake.requests[1].headers["Last-Event-ID"] == "2"
    assert seen[-1].job is not None
    assert seen[-1].job.id == "job_1"
    assert seen[0].job is None


async def test_a_stream_that_has_nothing_more_to_say_ends(client: AsyncClient, fake: Fake) -> None:
    fake.streams(event(7, "job.snapshot", text="all", status="completed"))
    assert [item.text async for item in client.events("job_1", after=2)] == ["all"]
    fake.says(None, 204)
    assert [item async for item in client.events("job_1", after=7)] == []


async def test_iterating_follows_the_pages(client: AsyncClient, fake: Fake) -> None:
    fake.says({"data": [JOB], "has_more": True, "last_id": "job_1"})
    fake.says({"data": [{**JOB, "id": "job_2"}], "has_more": False, "last_id": "job_2"})
    assert [job.id async for job in client.iter_jobs(status="queued")] == ["job_1", "job_2"]
    assert [dict(request.query) for request in fake.requests] == [
        {"limit": "100", "status": "queued"},
        {"limit": "100", "status": "queued", "after": "job_1"},
    ]


async def test_milliseconds_to_wait_are_preferred(client: AsyncClient, fake: Fake) -> None:
    fake.refuses(429, "queue_full", **{"Retry-After": "30", "retry-after-ms": "20"})
    fake.says(JOB, 202)
    async with asyncio.timeout(15):
        assert (await client.submit("/v1/x", {})).id == "job_1"


async def test_the_client_without_asyncio(client: AsyncClient, fake: Fake) -> None:
    fake.refuses(503, "unavailable", **{"Retry-After": "0"})
    fake.says(JOB, 202)
    fake.streams(event(1, "job.queued"), breaks=False)
    fake.streams(event(2, "job.completed"))
    fake.streams(event(1, "job.queued"), event(2, "job.completed"))
    fake.says({"data": [JOB], "has_more": False, "last_id": "job_1"})
    fake.refuses(404, "job_not_found")

    def use(url: str) -> None:
        with Client(url, "k") as sync:
            assert sync.submit("/v1/x", {}).id == "job_1"
            assert [item.seq for item in sync.events("job_1")] == [1, 2]
            # Left before its end, a stream is closed all the same.
            for item in sync.events("job_1"):
                assert item.seq == 1
                break
            assert [job.id for job in sync.iter_jobs()] == ["job_1"]
            with pytest.raises(ApiError, match="job_not_found"):
                sync.get("job_1")
        with pytest.raises(RuntimeError, match="context manager"):
            sync.models()

    await asyncio.to_thread(use, client._transport._url)
    keys = [request.headers.get("Idempotency-Key") for request in fake.requests[:2]]
    assert keys[0] == keys[1] is not None
