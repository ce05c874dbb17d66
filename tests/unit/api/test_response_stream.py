"""Streams of responses: their bound, their end with the server, the numbers of their events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from api import keys
from api.delivery.response_events import ResponseEvents
from broker.jobs import Job, Status
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, Api, eventually, serving


def _events(text: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: ")]


async def _stream(api: Api, text: str, **more: Any) -> list[dict[str, Any]]:
    body = {"model": CHAT, "input": text, "stream": True, **more}
    response = await api.client.post("/v1/responses", json=body)
    assert response.status == 200
    return _events(await response.read())


@pytest.fixture
async def hasty() -> AsyncIterator[Api]:
    settings = load(_env_file=None, api={"sync_timeout_s": 0.3, "ping_interval_s": 0.1})
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as running:
        yield running
    await hub.stop()


async def test_a_stream_that_takes_too_long_ends_and_so_does_its_job(hasty: Api) -> None:
    last = (await _stream(hasty, "hold"))[-1]
    assert (last["type"], last["code"]) == ("error", "deadline_exceeded")
    (job,), _ = hasty.queue.list_jobs("ten_a")
    await eventually(lambda: hasty.queue.get(job.id).status is Status.CANCELLED)


async def test_a_diverging_successor_ends_the_stream(api: Api) -> None:
    last = (await _stream(api, "diverge"))[-1]
    assert (last["type"], last["code"]) == ("error", "worker_lost")


async def test_a_stream_ends_when_the_server_shuts_down(api: Api) -> None:
    body = {"model": CHAT, "input": "hold", "stream": True, "background": True}
    response = await api.client.post("/v1/responses", json=body)
    await api.worker.holding.wait()
    api.app[keys.CLOSING].begin()
    last = _events(await response.read())[-1]
    assert (last["type"], last["code"]) == ("error", "shutting_down")
    assert api.queue.get(api.worker.held[0].job.id).status is Status.IN_PROGRESS


async def _record(api: Api) -> Job:
    made = await api.client.post("/v1/responses", json={"model": CHAT, "input": "hi"})
    return api.queue.get("job_" + (await made.json())["id"].removeprefix("resp_"))


async def test_a_number_says_how_much_of_the_text_its_reader_has(api: Api) -> None:
    job = await _record(api)
    whole = ResponseEvents(job)
    sent = whole.opening() + whole.start() + whole.text("one t") + whole.text("wo three")
    known = _events(sent)
    assert [event["sequence_number"] for event in known] == [0, 1, 2, 3, 8, 16]
    for cut in range(3, 17):
        rest = ResponseEvents(job, after=cut)
        # Cut into other pieces than the first time.
        again = rest.opening() + rest.start() + b"".join(map(rest.text, "one two three"))
        said = "".join(event["delta"] for event in _events(again))
        assert said == "one two three"[cut - 3 :]
    end = _events(whole.end(job))
    assert [event["sequence_number"] for event in end] == [17, 18, 19, 20]
    assert ResponseEvents(job, after=20).opening() == b""


@pytest.mark.parametrize(
    ("status", "kind"),
    [(Status.FAILED, "failed"), (Status.EXPIRED, "failed"), (Status.CANCELLED, "cancelled")],
)
async def test_how_a_job_ends_without_an_answer(api: Api, status: Status, kind: str) -> None:
    job = replace(await _record(api), status=status, output=None)
    (event,) = _events(ResponseEvents(job).end(job))
    assert event["type"] == f"response.{kind}"
    assert event["response"]["status"] == kind
