"""The native job calls."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import orjson
from aiohttp import hdrs, web

from api import keys
from api.delivery.attendance import REPLAYED, enqueue, first_record
from api.delivery.following import QUEUED_SEQ, Follower, final_record
from api.errors import ApiError
from api.handlers.body import ANYHOW, Preference, preference, query_number, read_body
from api.handlers.intake import Terms, milliseconds, new_job
from api.handlers.responses import previous
from api.handlers.webhooks import accept_url
from api.limit_headers import limit_headers
from api.ports import Queue
from api.schemas.job_object import accepted_object, job_object, overhead_ms, queue_ms
from api.schemas.jobs import CANCELS, LISTING, RETRY, SUBMISSION, Webhook
from api.schemas.parsing import parse, parse_query
from api.schemas.responses import ResponseRequest
from broker.errors import JobNotFoundError
from broker.jobs import Accepted, Job, NewJob, Status
from broker.queue import CancelResult
from broker.stats import Position
from broker.webhooks.endpoints import JobWebhook
from config.logs import get_logger

log = get_logger(__name__)

_JSON: Final = "application/json"
_JOB_ID: Final = re.compile(r"job_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
#: Seconds after which asking again for a pending job makes sense.
_POLL_S: Final = "1"
#: Longest wait for a record over an absence of the queue.
_RECORD_S = 5.0


async def submit(request: web.Request) -> web.Response:
    """`POST /v1/jobs`."""
    raw = await read_body(request)
    wanted = parse(SUBMISSION, raw)
    ttl_s = wanted.ttl
    if wanted.store is False:
        unstored_s = request.app[keys.SETTINGS].api.unstored_ttl_s
        ttl_s = min(ttl_s or unstored_s, unstored_s)
    if isinstance(wanted.body, ResponseRequest):
        await _go_on(request, wanted.body)
    job = new_job(
        request,
        wanted.body,
        raw,
        priority=wanted.priority,
        metadata=wanted.metadata,
        terms=Terms(
            ttl_s=ttl_s,
            max_attempts=wanted.max_attempts,
            deadline_ms=milliseconds(wanted.deadline),
            execution_timeout_ms=milliseconds(wanted.execution_timeout),
            delay_ms=milliseconds(wanted.delay),
            no_store=wanted.store is False,
        ),
        within="body.",
    )
    if wanted.webhook is not None:
        job = replace(job, webhook=_job_webhook(request, wanted.webhook))
    max_wait_s = request.app[keys.SETTINGS].api.max_wait_s
    return await accept(request, job, preference(request, max_wait_s=max_wait_s))


async def _go_on(request: web.Request, wanted: ResponseRequest) -> None:
    """Give a response what was said before. Raises `ApiError`."""
    if wanted.conversation_id is not None:
        message = "Use POST /v1/responses with background for this."
        raise ApiError("unsupported_parameter", message, param="body.conversation")
    if wanted.previous_response_id is not None:
        wanted.go_on_from(await previous(request, wanted.previous_response_id))


def _job_webhook(request: web.Request, wanted: Webhook) -> bytes:
    """As the job's record keeps it. Raises `ApiError`."""
    return JobWebhook(
        url=accept_url(request.app[keys.SETTINGS], wanted.url, param="webhook.url"),
        event_types=tuple(dict.fromkeys(wanted.events)),
        include_output=wanted.include_output,
    ).to_json()


async def accept(request: web.Request, job: NewJob, prefer: Preference) -> web.Response:
    """Enqueue a background job; with `Prefer: wait` answer with its end when that is near."""
    app = request.app
    if not prefer.wait_s:
        accepted = await enqueue(app, job)
        if accepted.replayed:
            return await _replayed(request, accepted, prefer)
        return _accepted(request, job, accepted, prefer)
    started = time.perf_counter()
    async with app[keys.HUB].subscribe(job.id) as subscription:
        accepted = await enqueue(app, job)
        if accepted.replayed:
            return await _replayed(request, accepted, prefer)
        follower = Follower(app[keys.QUEUE], subscription, job.id, after=QUEUED_SEQ)
        if not await follower.terminal(within_s=prefer.wait_s):
            return _accepted(request, job, accepted, prefer)
    app[keys.METRICS].job_submitted(job.model, job.endpoint, job.band)
    record = await final_record(app[keys.QUEUE], job.id, within_s=_RECORD_S)
    headers = {**prefer.applied, **limit_headers(accepted.limits)}
    headers["x-overhead-ms"] = str(overhead_ms(record, time.perf_counter() - started))
    return show(record, headers=headers)


def _accepted(
    request: web.Request, job: NewJob, accepted: Accepted, prefer: Preference
) -> web.Response:
    request.app[keys.METRICS].job_submitted(job.model, job.endpoint, job.band)
    created_ms = time.time_ns() // 1_000_000
    headers: dict[str, str] = {
        hdrs.CONTENT_TYPE: _JSON,
        hdrs.LOCATION: f"/v1/jobs/{job.id}",
        hdrs.RETRY_AFTER: _POLL_S,
    }
    if prefer is not ANYHOW:
        headers |= prefer.applied
    if accepted.limits:
        headers |= limit_headers(accepted.limits)
    body = accepted_object(job, created_ms=created_ms, position=accepted.position)
    return web.Response(status=202, body=body, headers=headers)


async def _replayed(request: web.Request, accepted: Accepted, prefer: Preference) -> web.Response:
    """The job that the idempotency key stands for, as it is now (or within `Prefer: wait`)."""
    job = await first_record(request.app[keys.QUEUE], accepted.job_id)
    if prefer.wait_s and not job.is_terminal:
        job = await _wait(request, job.id, job.seq, prefer.wait_s)
    headers = {
        hdrs.LOCATION: f"/v1/jobs/{job.id}",
        **REPLAYED,
        **prefer.applied,
        **limit_headers(accepted.limits),
    }
    status = 200 if job.is_terminal else 202
    return await show_waiting(request, job, status=status, headers=headers)


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/jobs/{id}`, with `?wait=` a long poll."""
    job_id = job_id_of(request)
    tenant = request[keys.PRINCIPAL].tenant
    queue = request.app[keys.QUEUE]
    wait_s = query_number(request, "wait")
    job = await known_job(queue, job_id, tenant)
    if wait_s and not job.is_terminal:
        wait_s, seq = min(wait_s, request.app[keys.SETTINGS].api.max_wait_s), job.seq
        # It holds the prompt, of 10 MB perhaps, and thousands may wait for a minute.
        del job
        job = await _wait(request, job_id, seq, wait_s)
    etag = f'"{job.seq}"'
    headers: dict[str, str] = {hdrs.ETAG: etag}
    known = request.headers.get(hdrs.IF_NONE_MATCH, "")
    # Found anywhere in a list of tags, weak or not: its quotes delimit it.
    if etag not in known and known.strip() != "*":
        return await show_waiting(request, job, headers=headers)
    if not job.is_terminal:
        headers[hdrs.RETRY_AFTER] = _POLL_S
    return web.Response(status=304, headers=headers)


async def known_job(queue: Queue, job_id: str, tenant: str) -> Job:
    """The tenant's job. Raises `ApiError` when it is known to have been kept long enough."""
    try:
        return await queue.get(job_id, tenant=tenant)
    except JobNotFoundError:
        if await queue.was_kept(job_id, tenant=tenant):
            raise ApiError("result_expired", job_id=job_id) from None
        raise


async def _wait(request: web.Request, job_id: str, seq: int, wait_s: float) -> Job:
    """The record when the job, last seen at `seq`, has ended or time (or the server) is up."""
    app = request.app
    async with app[keys.HUB].subscribe(job_id) as subscription:
        follower = Follower(app[keys.QUEUE], subscription, job_id, after=seq, from_log=True)
        async with app[keys.CLOSING].interrupts():
            await follower.terminal(within_s=wait_s)
    return await final_record(app[keys.QUEUE], job_id, within_s=_RECORD_S)


async def listing(request: web.Request) -> web.Response:
    """`GET /v1/jobs`."""
    wanted = parse_query(LISTING, request.query)
    if wanted.after is not None and not _JOB_ID.fullmatch(wanted.after):
        raise ApiError("invalid_request", "It must be the id of a job.", param="after")
    jobs, has_more = await request.app[keys.QUEUE].list_jobs(
        request[keys.PRINCIPAL].tenant,
        status=wanted.status,
        model=wanted.model,
        band=wanted.priority,
        created_after_ms=int((wanted.created_after or 0) * 1000),
        after=wanted.after,
        limit=wanted.limit,
        newest_first=wanted.order == "desc",
    )
    page = {
        "object": "list",
        "data": [job_object(job, with_output=False) for job in jobs],
        "has_more": has_more,
        "first_id": jobs[0].id if jobs else None,
        "last_id": jobs[-1].id if jobs else None,
    }
    return web.Response(body=orjson.dumps(page), content_type=_JSON)


async def cancel(request: web.Request) -> web.Response:
    """`POST /v1/jobs/{id}/cancel`: 202 while it is still being stopped, else 200."""
    job_id = job_id_of(request)
    tenant = request[keys.PRINCIPAL].tenant
    queue = request.app[keys.QUEUE]
    result = await queue.cancel(job_id, tenant=tenant)
    job = await queue.get(job_id, tenant=tenant)
    return show(job, status=202 if result == "cancelling" and not job.is_terminal else 200)


async def cancel_many(request: web.Request) -> web.Response:
    """`POST /v1/jobs/cancel`: what became of each id, in the order asked."""
    wanted = parse(CANCELS, await read_body(request))
    ids = list(dict.fromkeys(wanted.ids))
    known = [job_id for job_id in ids if _JOB_ID.fullmatch(job_id)]
    results: dict[str, CancelResult] = {}
    if known:
        results = await request.app[keys.QUEUE].cancel_many(
            known, tenant=request[keys.PRINCIPAL].tenant
        )
    data = [{"id": job_id, "result": results.get(job_id, "not_found")} for job_id in ids]
    return web.Response(body=orjson.dumps({"object": "list", "data": data}), content_type=_JSON)


async def retry(request: web.Request) -> web.Response:
    """`POST /v1/jobs/{id}/retry`: a failed or expired job goes in again, with all its attempts."""
    job_id = job_id_of(request)
    tenant = request[keys.PRINCIPAL].tenant
    queue = request.app[keys.QUEUE]
    raw = await read_body(request)
    deadline_ms = milliseconds(parse(RETRY, raw).deadline) if raw else 0
    accepted = await queue.retry(job_id, tenant=tenant, deadline_ms=deadline_ms)
    job = await queue.get(job_id, tenant=tenant)
    headers: dict[str, str] = {
        hdrs.LOCATION: f"/v1/jobs/{job_id}",
        **limit_headers(accepted.limits),
    }
    return await show_waiting(request, job, status=202, headers=headers)


async def delete(request: web.Request) -> web.Response:
    """`DELETE /v1/jobs/{id}`: cancel and erase; 202 while a running one is still being stopped."""
    job_id = job_id_of(request)
    tenant = request[keys.PRINCIPAL].tenant
    erased = await request.app[keys.QUEUE].erase(job_id, tenant=tenant)
    log.info("job_erased", job_id=job_id, at_once=erased)
    body = orjson.dumps({"id": job_id, "object": "job.deleted", "deleted": True})
    return web.Response(status=200 if erased else 202, body=body, content_type=_JSON)


def job_id_of(request: web.Request) -> str:
    """The id in the path. One that can't exist is answered like one that doesn't."""
    job_id = request.match_info["job_id"]
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFoundError
    return job_id


async def show_waiting(
    request: web.Request, job: Job, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """As `show`, and where the job stands in its queue while it waits."""
    position = None
    if job.status is Status.QUEUED:
        # It may have started, or even ended and expired, since it was read.
        with suppress(JobNotFoundError):
            position = await request.app[keys.QUEUE].position(job.id)
    return show(job, position, status=status, headers=headers)


def show(
    job: Job,
    position: Position | None = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    shown = {hdrs.CONTENT_TYPE: _JSON, **(headers or {})}
    if not job.is_terminal:
        shown[hdrs.RETRY_AFTER] = _POLL_S
    if (waited_ms := queue_ms(job)) is not None:
        shown["x-queue-ms"] = str(waited_ms)
    body = orjson.dumps(job_object(job, position=position))
    return web.Response(status=status, body=body, headers=shown)
