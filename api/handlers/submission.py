"""Jobs on their way in: `POST /v1/jobs`, and what background calls share with it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from aiohttp import hdrs, web

from api import keys
from api.delivery.attendance import REPLAYED, enqueue, first_record
from api.delivery.following import QUEUED_SEQ, Follower, final_record
from api.errors import ApiError
from api.handlers.body import ANYHOW, Preference, preference, read_body
from api.handlers.intake import Terms, milliseconds, new_job
from api.handlers.jobs import POLL_S, RECORD_S, show, show_waiting, wait_for_end
from api.handlers.responses import previous
from api.handlers.webhooks import accept_url
from api.limit_headers import limit_headers
from api.schemas.job_object import accepted_object, overhead_ms
from api.schemas.jobs import SUBMISSION, Webhook
from api.schemas.parsing import parse
from api.schemas.responses import ResponseRequest
from broker.jobs import Accepted, NewJob
from broker.webhooks.endpoints import JobWebhook

_JSON: Final = "application/json"


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
    record = await final_record(app[keys.QUEUE], job.id, within_s=RECORD_S)
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
        hdrs.RETRY_AFTER: POLL_S,
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
        job = await wait_for_end(request, job.id, job.seq, prefer.wait_s)
    headers = {
        hdrs.LOCATION: f"/v1/jobs/{job.id}",
        **REPLAYED,
        **prefer.applied,
        **limit_headers(accepted.limits),
    }
    status = 200 if job.is_terminal else 202
    return await show_waiting(request, job, status=status, headers=headers)
