"""Writes a response's events, up to its end, to whoever asked for it or comes back to it."""

from __future__ import annotations

import asyncio
import math
from typing import Final

from aiohttp import web

from api import keys
from api.delivery import sse
from api.delivery.following import Follower, final_record
from api.delivery.relay import DivergedError, TextRelay
from api.delivery.response_events import ResponseEvents
from api.errors import ApiError, from_broker
from api.schemas.response_object import output_text
from broker.errors import BrokerError
from broker.jobs import Event, EventType, Job, Status

#: Longest wait for the record of a job that is known to have ended.
_RECORD_S: Final = 10.0


async def write_response(
    request: web.Request,
    job: Job,
    follower: Follower,
    events: ResponseEvents,
    *,
    within_s: float = math.inf,
) -> web.StreamResponse:
    """Follow the job to its end, or for `within_s`.

    A server that shuts down breaks off; readers resume elsewhere.
    """
    headers = {"x-request-id": request[keys.REQUEST_ID], "x-job-id": job.id}
    stream = await sse.open_stream(request, headers)
    await stream.write(events.opening() or sse.PING)
    try:
        await _follow(request, stream, job, follower, events, within_s)
    except (ApiError, BrokerError) as error:
        shown = from_broker(error) if isinstance(error, BrokerError) else error
        request.app[keys.METRICS].request_refused(shown.code)
        await stream.write(events.broken(shown.code, shown.message))
    await stream.write_eof()
    return stream


async def _follow(
    request: web.Request,
    stream: sse.EventStream,
    job: Job,
    follower: Follower,
    events: ResponseEvents,
    within_s: float,
) -> None:
    app, text = request.app, TextRelay()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    ping_s = app[keys.SETTINGS].api.ping_interval_s
    async with app[keys.CLOSING].interrupts():
        while not follower.finished:
            if loop.time() >= deadline:
                raise ApiError("deadline_exceeded", job_id=job.id)
            item = await follower.next(min(ping_s, deadline - loop.time()))
            if item is None:
                await stream.write(sse.PING)
                continue
            if isinstance(item, Event) and item.type is EventType.IN_PROGRESS:
                await stream.write(events.start())
            try:
                piece = text.take(item)
            except DivergedError:
                raise _lost(job) from None
            if piece and (said := events.start() + events.text(piece)):
                await stream.write(said)
    if not follower.finished:
        raise ApiError("shutting_down", job_id=job.id)
    record = await final_record(app[keys.QUEUE], job.id, within_s=_RECORD_S)
    if record.erased_ms:
        raise ApiError("result_expired", job_id=job.id)
    said = b""
    if record.status is Status.COMPLETED:
        try:
            said = events.start() + events.text(text.complete(output_text(record)))
        except DivergedError:
            raise _lost(job) from None
    await stream.write(said + events.end(record) or sse.PING)


def _lost(job: Job) -> ApiError:
    message = "The worker was lost and its successor's text differs; please ask again."
    return ApiError("worker_lost", message, job_id=job.id)
