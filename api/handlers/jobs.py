"""The native job calls, but for the submission."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import orjson
from aiohttp import hdrs, web

from api import keys
from api.delivery.following import Follower, final_record
from api.errors import ApiError
from api.handlers.body import query_number, read_body
from api.handlers.intake import milliseconds
from api.limit_headers import limit_headers
from api.ports import Queue
from api.schemas.job_object import job_object, queue_ms
from api.schemas.jobs import CANCELS, LISTING, RETRY
from api.schemas.parsing import parse, parse_query
from broker.errors import JobNotFoundError
from broker.jobs import Job, Status
from broker.queue import CancelResult
from broker.stats import Position
from config.logs import get_logger

log = get_logger(__name__)

_JSON: Final = "application/json"
_JOB_ID: Final = re.compile(r"job_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
#: Seconds after which asking again for a pending job makes sense.
POLL_S: Final = "1"
#: Waiting jobs of a page whose position is told; each costs a look into its queue.
_POSITIONS: Final = 20
#: Longest wait for a record over an absence of the queue.
RECORD_S = 5.0


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
        job = await wait_for_end(request, job_id, seq, wait_s)
    etag = f'"{job.seq}"'
    headers: dict[str, str] = {hdrs.ETAG: etag}
    known = request.headers.get(hdrs.IF_NONE_MATCH, "")
    # Found anywhere in a list of tags, weak or not: its quotes delimit it.
    if etag not in known and known.strip() != "*":
        return await show_waiting(request, job, headers=headers)
    if not job.is_terminal:
        headers[hdrs.RETRY_AFTER] = POLL_S
    return web.Response(status=304, headers=headers)


async def known_job(queue: Queue, job_id: str, tenant: str) -> Job:
    """The tenant's job. Raises `ApiError` when it is known to have been kept long enough."""
    try:
        return await queue.get(job_id, tenant=tenant)
    except JobNotFoundError:
        if await queue.was_kept(job_id, tenant=tenant):
            raise ApiError("result_expired", job_id=job_id) from None
        raise


async def wait_for_end(request: web.Request, job_id: str, seq: int, wait_s: float) -> Job:
    """The record when the job, last seen at `seq`, has ended or time (or the server) is up."""
    app = request.app
    async with app[keys.HUB].subscribe(job_id) as subscription:
        follower = Follower(app[keys.QUEUE], subscription, job_id, after=seq, from_log=True)
        async with app[keys.CLOSING].interrupts():
            await follower.terminal(within_s=wait_s)
    return await final_record(app[keys.QUEUE], job_id, within_s=RECORD_S)


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
    positions = await _positions(request, jobs)
    page = {
        "object": "list",
        "data": [
            job_object(job, with_output=False, position=positions.get(job.id)) for job in jobs
        ],
        "has_more": has_more,
        "first_id": jobs[0].id if jobs else None,
        "last_id": jobs[-1].id if jobs else None,
    }
    return web.Response(body=orjson.dumps(page), content_type=_JSON)


async def _positions(request: web.Request, jobs: list[Job]) -> dict[str, Position]:
    """Where some of a page's waiting jobs stand; asked in one go."""
    waiting = [job.id for job in jobs if job.status is Status.QUEUED][:_POSITIONS]
    queue = request.app[keys.QUEUE]
    found = await asyncio.gather(*map(queue.position, waiting), return_exceptions=True)
    positions: dict[str, Position] = {}
    for job_id, position in zip(waiting, found, strict=True):
        # One may have gone meanwhile; a page isn't refused for it.
        if isinstance(position, BaseException):
            if not isinstance(position, JobNotFoundError):
                raise position
        elif position is not None:
            positions[job_id] = position
    return positions


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
        shown[hdrs.RETRY_AFTER] = POLL_S
    if (waited_ms := queue_ms(job)) is not None:
        shown["x-queue-ms"] = str(waited_ms)
    body = orjson.dumps(job_object(job, position=position))
    return web.Response(status=status, body=body, headers=shown)
