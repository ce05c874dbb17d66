"""`/v1/responses`: jobs that remember what was said before."""

from __future__ import annotations

import time
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from api import keys
from api.delivery.attendance import REPLAYED, attended, enqueue, first_record
from api.delivery.following import Follower, final_record
from api.delivery.response_events import ResponseEvents
from api.delivery.response_stream import write_response
from api.errors import ApiError, from_job
from api.handlers.body import preference, read_body
from api.handlers.conversations import Claimed, claim
from api.handlers.intake import Terms, new_job
from api.limit_headers import limit_headers
from api.ports import Queue
from api.schemas.job_object import overhead_ms, queue_ms
from api.schemas.parsing import parse, parse_query
from api.schemas.response_object import (
    history_after,
    input_items,
    is_response,
    item_page,
    job_id_for,
    response_id,
    response_object,
)
from api.schemas.responses import ITEM_LISTING, RESPONSE, RETRIEVAL, Message, ResponseRequest
from broker.errors import BrokerError, JobNotFoundError
from broker.jobs import Job, NewJob, Status
from config.logs import get_logger

log = get_logger(__name__)

_JSON: Final = "application/json"
_RECORD_S: Final = 10.0
#: Longest wait for a running job to stop once it was cancelled.
_STOP_S: Final = 5.0


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/responses`: waits, streams, or with `background` returns at once."""
    raw = await read_body(request)
    wanted = parse(RESPONSE, raw)
    objection = wanted.objection()
    if objection is not None:
        raise ApiError(objection.code, objection.message, param=objection.param)
    claimed = await _go_on(request, wanted)
    try:
        terms = Terms(ttl_s=_ttl_s(request, wanted), no_store=wanted.store is False)
        job = new_job(request, wanted, raw, terms=terms)
        if claimed is not None:
            await claimed.lock(job.id)
        return await _run(request, wanted, job)
    except (ApiError, BrokerError):
        if claimed is not None:
            request.app[keys.BACKGROUND].spawn(claimed.settle())
        raise


async def _run(request: web.Request, wanted: ResponseRequest, job: NewJob) -> web.StreamResponse:
    max_wait_s = request.app[keys.SETTINGS].api.max_wait_s
    prefer = preference(request, max_wait_s=max_wait_s)
    if wanted.background or prefer.respond_async:
        return await _in_background(request, wanted, job)
    queue = request.app[keys.QUEUE]
    try:
        if wanted.streams:
            async with attended(request.app, job) as attendance:
                _count(request, attendance.job, replayed=attendance.replayed)
                record = await queue.get(attendance.job.id)
                follower, events = attendance.follower, ResponseEvents(record)
                within_s = request.app[keys.SETTINGS].api.sync_timeout_s
                return await write_response(request, record, follower, events, within_s=within_s)
        return await _answer(request, job)
    finally:
        if wanted.store is False and not job.idempotency_key:
            request.app[keys.BACKGROUND].spawn(_forget(queue, job.id))


async def _answer(request: web.Request, job: NewJob) -> web.Response:
    app, started = request.app, time.perf_counter()
    async with attended(app, job) as attendance:
        _count(request, job, replayed=attendance.replayed)
        job_id = attendance.job.id
        if not await attendance.follower.terminal(within_s=app[keys.SETTINGS].api.sync_timeout_s):
            raise ApiError("deadline_exceeded", job_id=job_id)
    record = await final_record(app[keys.QUEUE], job_id, within_s=_RECORD_S)
    if record.status is not Status.COMPLETED or record.output is None:
        raise from_job(record)
    headers = limit_headers(attendance.limits)
    if attendance.replayed:
        headers.update(REPLAYED)
    else:
        headers["x-overhead-ms"] = str(overhead_ms(record, time.perf_counter() - started))
    return _show(record, headers)


async def _in_background(
    request: web.Request, wanted: ResponseRequest, job: NewJob
) -> web.StreamResponse:
    app = request.app
    accepted = await enqueue(app, job)
    _count(request, job, replayed=accepted.replayed)
    record = await first_record(app[keys.QUEUE], accepted.job_id)
    if wanted.streams:
        return await _stream(request, record, after=-1)
    headers = limit_headers(accepted.limits)
    if accepted.replayed:
        headers.update(REPLAYED)
    return _show(record, headers)


async def fetch(request: web.Request) -> web.StreamResponse:
    """`GET /v1/responses/{id}`; with `stream` its events after `starting_after`."""
    wanted = parse_query(RETRIEVAL, request.query)
    job = await _find(request)
    if not wanted.stream:
        if wanted.starting_after is not None:
            raise ApiError("invalid_request", "It needs stream=true.", param="starting_after")
        return _show(job)
    after = -1 if wanted.starting_after is None else wanted.starting_after
    return await _stream(request, job, after=after)


async def cancel(request: web.Request) -> web.Response:
    """`POST /v1/responses/{id}/cancel`: the response once it has stopped."""
    app, job = request.app, await _find(request)
    queue = app[keys.QUEUE]
    async with app[keys.HUB].subscribe(job.id) as subscription:
        if await queue.cancel(job.id, tenant=job.tenant) == "cancelling":
            follower = Follower(queue, subscription, job.id, after=job.seq, from_log=True)
            async with app[keys.CLOSING].interrupts():
                await follower.terminal(within_s=_STOP_S)
    return _show(await final_record(queue, job.id, within_s=_RECORD_S))


async def delete(request: web.Request) -> web.Response:
    """`DELETE /v1/responses/{id}`: as `DELETE /v1/jobs/{id}`."""
    job = await _find(request)
    await request.app[keys.QUEUE].erase(job.id, tenant=job.tenant)
    log.info("response_erased", job_id=job.id)
    shown = {"id": response_id(job.id), "object": "response.deleted", "deleted": True}
    return web.Response(body=orjson.dumps(shown), content_type=_JSON)


async def list_inputs(request: web.Request) -> web.Response:
    """`GET /v1/responses/{id}/input_items`: what its request said, not what went before."""
    wanted = parse_query(ITEM_LISTING, request.query)
    page = item_page(input_items(await _find(request)), wanted)
    if page is None:
        raise ApiError("invalid_request", "It must be the id of an item.", param="after")
    return web.Response(body=orjson.dumps(page), content_type=_JSON)


async def _go_on(request: web.Request, wanted: ResponseRequest) -> Claimed | None:
    """Give the request what was said before. A conversation has to be locked and settled."""
    if wanted.conversation_id is not None:
        claimed = await claim(request, wanted.conversation_id)
        wanted.go_on_from(claimed.history)
        return claimed
    if wanted.previous_response_id is not None:
        wanted.go_on_from(await previous(request, wanted.previous_response_id))
    return None


async def previous(request: web.Request, previous_id: str) -> list[Message]:
    """All that was said up to a completed response. Raises `ApiError`."""
    try:
        job = await _get(request, previous_id)
    except ApiError:
        raise ApiError(
            "not_found", "There is no such response.", param="previous_response_id"
        ) from None
    if job.status is not Status.COMPLETED:
        message = "The response has not been completed."
        raise ApiError("invalid_request", message, param="previous_response_id")
    return history_after(job)


async def _find(request: web.Request) -> Job:
    return await _get(request, request.match_info["response_id"])


async def _get(request: web.Request, name: str) -> Job:
    """A response of the tenant. Raises `ApiError`; other jobs and erased ones are none."""
    tenant, queue = request[keys.PRINCIPAL].tenant, request.app[keys.QUEUE]
    try:
        job_id = job_id_for(name)
        if job_id is not None and is_response(job := await queue.get(job_id, tenant=tenant)):
            return job
    except JobNotFoundError:
        pass
    raise ApiError("not_found", "There is no such response.")


async def _stream(request: web.Request, job: Job, *, after: int) -> web.StreamResponse:
    """Its events after number `after`; leaving doesn't cancel it."""
    queue, events = request.app[keys.QUEUE], ResponseEvents(job, after=after)
    async with request.app[keys.HUB].subscribe(job.id) as subscription:
        follower = Follower(queue, subscription, job.id, from_log=True)
        follower.finished = job.is_terminal
        return await write_response(request, job, follower, events)


def _show(job: Job, headers: dict[str, str] | None = None) -> web.Response:
    shown = {hdrs.CONTENT_TYPE: _JSON, "x-job-id": job.id, "x-priority": job.band.value}
    if (waited_ms := queue_ms(job)) is not None:
        shown["x-queue-ms"] = str(waited_ms)
    body: dict[str, Any] = response_object(job)
    return web.Response(body=orjson.dumps(body), headers={**shown, **(headers or {})})


def _ttl_s(request: web.Request, wanted: ResponseRequest) -> int:
    settings = request.app[keys.SETTINGS].api
    if wanted.store is False:
        return settings.unstored_ttl_s
    if wanted.conversation_id is not None:
        return max(settings.response_ttl_s, settings.conversation_ttl_s)
    return settings.response_ttl_s


def _count(request: web.Request, job: NewJob, *, replayed: bool) -> None:
    if not replayed:
        request.app[keys.METRICS].job_submitted(job.model, job.endpoint, job.band)


async def _forget(queue: Queue, job_id: str) -> None:
    """Erase a response that wasn't to be stored, once it was delivered."""
    try:
        await queue.erase(job_id)
    except BrokerError as error:
        # It goes by itself, `unstored_ttl_s` after its end.
        log.info("response_not_erased", job_id=job_id, reason=type(error).__name__)
