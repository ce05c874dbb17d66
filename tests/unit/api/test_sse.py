"""Open streams whose reader, queue or handler fails."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from api import keys
from api.handlers import events
from broker.errors import BrokerUnavailableError
from broker.jobs import Delta, Status
from tests.apiserver import Api, chat, eventually, job
from tests.conftest import PATIENCE_S

#: More than the buffers of both ends hold.
_FLOOD = "x" * 16_000_000


async def _raw(
    api: Api, method: str, path: str, payload: object = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader that takes no more than it is asked to."""
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port, limit=1024)
    body = b"" if payload is None else orjson.dumps(payload)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def _held(api: Api) -> str:
    response = await api.client.post("/v1/jobs", json=job("hold", body={"stream": True}))
    await api.worker.holding.wait()
    return str((await response.json())["id"])


def _flood(api: Api) -> None:
    claim = api.worker.held[0]
    piece = Delta(job_id=claim.job.id, attempt=claim.attempt, text=_FLOOD)
    api.queue.emit(claim.queue, [piece])


async def _cut(api: Api, method: str, route: str) -> None:
    """Wait until the handler has ended without having answered."""
    labels = {"method": method, "route": route, "status": "499"}
    name, registry = "forebay_api_request_duration_seconds_count", api.app[keys.METRICS].registry
    await eventually(lambda: registry.get_sample_value(name, labels))


async def test_a_sync_reader_that_stalls_is_cut_and_its_job_cancelled(api: Api) -> None:
    reader, writer = await _raw(api, "POST", "/v1/chat/completions", chat("hold", stream=True))
    await reader.readuntil(b"held ")
    job_id = api.worker.held[0].job.id
    _flood(api)
    await _cut(api, "POST", "/v1/chat/completions")
    await eventually(lambda: api.queue.get(job_id).status is Status.CANCELLED)
    assert len(await reader.read(-1)) < len(_FLOOD)
    writer.close()


async def test_a_reader_of_events_that_stalls_is_cut_and_the_job_goes_on(api: Api) -> None:
    job_id = await _held(api)
    reader, writer = await _raw(api, "GET", f"/v1/jobs/{job_id}/events")
    await reader.readuntil(b"in_progress")
    _flood(api)
    await _cut(api, "GET", "/v1/jobs/{job_id}/events")
    api.worker.check_cancelled()
    assert api.queue.get(job_id).status is Status.IN_PROGRESS
    writer.close()


async def test_a_slow_reader_gets_everything(api: Api) -> None:
    job_id = await _held(api)
    response = await api.client.get(f"/v1/jobs/{job_id}/events")
    await response.content.readuntil(b"in_progress")
    _flood(api)
    api.worker.release()
    text = await response.text()
    assert _FLOOD in text
    assert "job.completed" in text


async def test_events_end_early_when_the_record_stays_out_of_reach(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise BrokerUnavailableError("away")

    job_id = await _held(api)
    reader, writer = await _raw(api, "GET", f"/v1/jobs/{job_id}/events")
    heard = await reader.readuntil(b"in_progress")
    monkeypatch.setattr(events, "_RECORD_S", 0.0)
    monkeypatch.setattr(api.app[keys.QUEUE], "get", away, raising=False)
    api.worker.release()
    # The end of a chunked body: the caller comes back with its cursor.
    heard += await reader.readuntil(b"\r\n0\r\n\r\n")
    assert heard.count(b"HTTP/1.1") == 1
    assert b"job.completed" not in heard
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_crash_in_a_stream_breaks_it_off(
    api: Api, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def crash(*_: object, **__: Any) -> None:
        raise RuntimeError("boom")

    if stream:
        reader, writer = await _raw(api, "POST", "/v1/chat/completions", chat("hold", stream=True))
        heard = await reader.readuntil(b"held ")
    else:
        reader, writer = await _raw(api, "GET", f"/v1/jobs/{await _held(api)}/events")
        heard = await reader.readuntil(b"in_progress")
    monkeypatch.setattr(api.app[keys.QUEUE], "get", crash, raising=False)
    api.worker.release()
    # Neither an end nor a second head: nobody may take this for a whole answer.
    async with asyncio.timeout(PATIENCE_S):
        heard += await reader.read(-1)
    assert heard.count(b"HTTP/1.1") == 1
    assert not heard.endswith(b"\r\n0\r\n\r\n")
    assert "Error handling request" not in caplog.text
    writer.close()
