"""A synchronous stream: a job's deltas in OpenAI's chunk format, up to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import orjson
from aiohttp import web

from api import keys
from api.delivery import sse
from api.delivery.attendance import REPLAYED, Attendance, attended
from api.delivery.chunks import Chunks
from api.delivery.following import Follower, Snapshot, final_record
from api.delivery.pieces import PieceRelay
from api.delivery.relay import DivergedError, TextRelay
from api.errors import ApiError, error_object, from_broker, from_job
from api.limit_headers import limit_headers
from broker.errors import BrokerError
from broker.jobs import Event, EventType, Job, NewJob, Status

#: Longest wait for the record of a job that is known to have ended.
_RECORD_S: Final = 10.0


async def relay(
    request: web.Request,
    job: NewJob,
    chunks_of: Callable[[NewJob], Chunks],
    *,
    in_pieces: bool = False,
) -> web.StreamResponse:
    """Run the job and write its stream; `in_pieces` as in `broker.pieces`.

    `chunks_of` gets the job with the id that it really has. The headers wait for the first text (or
    `ping_interval_s`), so that a job that fails at once still gets the HTTP status of its error;
    later errors are an event of the stream.
    """
    app = request.app
    stream: _Stream | None = None
    submitted = asyncio.get_running_loop().time()
    try:
        async with attended(app, job) as attendance:
            if not attendance.replayed:
                app[keys.METRICS].job_submitted(job.model, job.endpoint, job.band)
            chunks = chunks_of(attendance.job)
            text = _Pieces(chunks) if in_pieces else _Text(chunks)
            stream = _Stream(request, attendance, chunks, text, submitted)
            await stream.follow(attendance.follower)
    except (ApiError, BrokerError) as error:
        if stream is None or stream.response is None:
            raise
        shown = from_broker(error) if isinstance(error, BrokerError) else error
        app[keys.METRICS].request_refused(shown.code)
        payload = {"error": error_object(shown, request[keys.REQUEST_ID])}
        await stream.response.write(sse.data(orjson.dumps(payload)))
    assert stream.response is not None
    await stream.response.write_eof()
    return stream.response


class _Text:
    """The chunks of a plain answer."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._relay = TextRelay()

    def take(self, item: Event | Snapshot) -> bytes:
        text = self._relay.take(item)
        return self._chunks.text(text) if text else b""

    def rest(self, record: Job) -> bytes:
        text = self._relay.complete(self._chunks.full_text(record))
        return self._chunks.text(text) if text else b""


class _Pieces:
    """The chunks where there are several answers or logprobs."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._relay = PieceRelay()

    def take(self, item: Event | Snapshot) -> bytes:
        return b"".join(map(self._chunks.piece, self._relay.take(item)))

    def rest(self, record: Job) -> bytes:
        rest = self._relay.complete(self._chunks.full_pieces(record))
        return b"".join(map(self._chunks.piece, rest))


class _Stream:
    def __init__(
        self,
        request: web.Request,
        attendance: Attendance,
        chunks: Chunks,
        text: _Text | _Pieces,
        submitted: float,
    ) -> None:
        self._request = request
        self._job = attendance.job
        self._replayed = attendance.replayed
        self._limits = limit_headers(attendance.limits)
        self._chunks = chunks
        self._text = text
        #: On the event loop's clock.
        self._submitted = submitted
        self._queue_ms: int | None = None
        self.response: web.StreamResponse | None = None

    async def follow(self, follower: Follower) -> None:
        """Write until the job ends. Raises `ApiError` when it doesn't end well."""
        settings = self._request.app[keys.SETTINGS].api
        loop = asyncio.get_running_loop()
        deadline = self._submitted + settings.sync_timeout_s
        while not follower.finished:
            if loop.time() >= deadline:
                raise ApiError("deadline_exceeded", job_id=self._job.id)
            item = await follower.next(min(settings.ping_interval_s, deadline - loop.time()))
            if item is None:
                await self._write(sse.PING)
            else:
                await self._take(item)
        await self._end()

    async def _take(self, item: Event | Snapshot) -> None:
        if (
            self._queue_ms is None
            and not self._replayed
            and isinstance(item, Event)
            and item.type is EventType.IN_PROGRESS
        ):
            waited_s = asyncio.get_running_loop().time() - self._submitted
            self._queue_ms = round(waited_s * 1000)
        try:
            said = self._text.take(item)
        except DivergedError:
            raise self._lost() from None
        if said:
            await self._write(said)

    async def _end(self) -> None:
        record = await final_record(self._request.app[keys.QUEUE], self._job.id, within_s=_RECORD_S)
        if record.status is not Status.COMPLETED or record.output is None:
            raise from_job(record)
        try:
            last = self._text.rest(record)
        except DivergedError:
            raise self._lost() from None
        await self._write(last + self._chunks.end(record))

    def _lost(self) -> ApiError:
        return ApiError(
            "worker_lost",
            "The worker was lost and its successor's text differs; please ask again.",
            job_id=self._job.id,
        )

    async def _write(self, data: bytes) -> None:
        if self.response is None:
            headers = {
                "x-request-id": self._request[keys.REQUEST_ID],
                "x-job-id": self._job.id,
                "x-priority": self._job.band.value,
                **self._limits,
            }
            if self._replayed:
                headers.update(REPLAYED)
            if self._queue_ms is not None:
                headers["x-queue-ms"] = str(self._queue_ms)
            self.response = await sse.open_stream(self._request, headers)
            data = self._chunks.first() + data
        await self.response.write(data)
