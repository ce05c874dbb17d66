"""`GET /v1/jobs/{id}/events`: a job's events as they happen, resumable on any process."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import orjson
from aiohttp import web

from api import keys
from api.delivery import sse
from api.delivery.following import Follower, Snapshot, final_record
from api.delivery.pieces import shown_pieces
from api.errors import ApiError
from api.handlers.jobs import job_id_of, known_job
from api.ports import Queue
from api.schemas.job_object import job_object
from broker.errors import BrokerUnavailableError, JobNotFoundError
from broker.jobs import TERMINAL, Event, EventType
from broker.pieces import in_pieces

#: Longest wait for the record of a job that is known to have ended.
_RECORD_S = 5.0


async def events(request: web.Request) -> web.StreamResponse:
    """Everything after the cursor, then what happens, up to the terminal event."""
    app = request.app
    queue = app[keys.QUEUE]
    job_id = job_id_of(request)
    cursor = _cursor(request)
    async with app[keys.HUB].subscribe(job_id) as subscription:
        job = await known_job(queue, job_id, request[keys.PRINCIPAL].tenant)
        if job.erased_ms and job.is_terminal:
            raise ApiError("result_expired", job_id=job_id)
        if cursor > job.seq:
            raise ApiError("invalid_request", "The job has no event of that number yet.")
        if job.is_terminal and cursor == job.seq:
            # Nothing will follow; 204 also tells an EventSource to stop asking.
            return web.Response(status=204)
        several = job.stream and in_pieces(orjson.loads(job.body))
        # It holds the prompt, and a stream may be long.
        del job
        follower = Follower(queue, subscription, job_id, after=cursor, from_log=True)
        stream = await sse.open_stream(request, {"x-request-id": request[keys.REQUEST_ID]})
        ping_s = app[keys.SETTINGS].api.ping_interval_s
        # The record may expire while somebody still reads, and the queue may be away for long:
        # the stream ends, and its reader can come back with the cursor it has.
        async with app[keys.CLOSING].interrupts():
            with suppress(JobNotFoundError, BrokerUnavailableError):
                while not follower.finished:
                    item = await follower.next(ping_s)
                    payload = (
                        sse.PING
                        if item is None
                        else await _render(queue, job_id, item, several=several)
                    )
                    await stream.write(payload)
        await stream.write_eof()
        return stream


def _cursor(request: web.Request) -> int:
    """`Last-Event-ID`, which a reconnecting EventSource sends by itself, else the query's."""
    text = request.headers.get("Last-Event-ID") or request.query.get("starting_after") or "0"
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
        raise ApiError(
            "invalid_request", "It must be the number of an event.", param="starting_after"
        )
    return int(text)


async def _render(queue: Queue, job_id: str, item: Event | Snapshot, *, several: bool) -> bytes:
    """`several`: the text is in pieces, of several answers or with their logprobs."""
    name = "job.snapshot" if isinstance(item, Snapshot) else item.type.value
    shown: dict[str, Any] = {"seq": item.seq, "type": name, "attempt": item.attempt}
    if isinstance(item, Snapshot):
        shown["status"] = item.status
    if isinstance(item, Snapshot) or item.type is EventType.DELTA:
        shown |= {"pieces": shown_pieces(item.text)} if several else {"text": item.text}
    if _is_last(item):
        # The end carries the whole job, output and all, so that no second call is needed.
        shown["job"] = job_object(await final_record(queue, job_id, within_s=_RECORD_S))
    return sse.event(item.seq, name, orjson.dumps(shown))


def _is_last(item: Event | Snapshot) -> bool:
    if isinstance(item, Snapshot):
        return item.status in TERMINAL
    return item.type.is_terminal
