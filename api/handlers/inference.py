"""The OpenAI-compatible calls: jobs that the connection waits for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final, TypeVar

from aiohttp import hdrs, web
from pydantic import TypeAdapter

from api import keys
from api.delivery.attendance import REPLAYED, attended
from api.delivery.chunks import ChatChunks, Chunks, CompletionChunks
from api.delivery.following import final_record
from api.delivery.streaming import relay
from api.errors import ApiError, from_job
from api.handlers.body import preference, read_body
from api.handlers.intake import new_job
from api.handlers.submission import accept
from api.limit_headers import limit_headers
from api.schemas.fields import TIER_OF
from api.schemas.inference import GenerationRequest, InferenceRequest
from api.schemas.job_object import overhead_ms, queue_ms
from api.schemas.jobs import CHAT, COMPLETION, EMBEDDING, MODERATION, RERANK
from api.schemas.parsing import parse
from broker.jobs import Ending, Job, NewJob, Status

Wanted = TypeVar("Wanted", bound=InferenceRequest)

_WRITERS: Final[dict[str, type[ChatChunks | CompletionChunks]]] = {
    "/v1/chat/completions": ChatChunks,
    "/v1/completions": CompletionChunks,
}
#: Longest wait for the record of a job that is known to have ended.
_RECORD_S: Final = 10.0


async def chat(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    return await _run(request, CHAT)


async def completion(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    return await _run(request, COMPLETION)


async def embedding(request: web.Request) -> web.StreamResponse:
    """`POST /v1/embeddings`."""
    return await _run(request, EMBEDDING)


async def moderation(request: web.Request) -> web.StreamResponse:
    """`POST /v1/moderations`."""
    return await _run(request, MODERATION)


async def rerank(request: web.Request) -> web.StreamResponse:
    """`POST /v1/rerank`."""
    return await _run(request, RERANK)


async def _run(request: web.Request, schema: TypeAdapter[Wanted]) -> web.StreamResponse:
    raw = await read_body(request)
    wanted = parse(schema, raw)
    job = new_job(request, wanted, raw)
    prefer = preference(request, max_wait_s=request.app[keys.SETTINGS].api.max_wait_s)
    if prefer.respond_async:
        return await accept(request, job, prefer)
    job = replace(job, id=request.app[keys.HUB].new_job_id())
    # The tier really used is echoed to whoever asked for one.
    tier = TIER_OF[job.band] if wanted.service_tier is not None else None
    if isinstance(wanted, GenerationRequest) and wanted.streams:
        writer, include_usage = _WRITERS[wanted.endpoint], wanted.include_usage
        created, answers = int(time.time()), wanted.n or 1

        def chunks_of(job: NewJob) -> Chunks:
            return writer(
                job.id,
                created=created,
                model=job.model,
                include_usage=include_usage,
                tier=tier,
                answers=answers,
            )

        in_pieces = answers > 1 or wanted.logprobs_wanted
        return await relay(request, job, chunks_of, in_pieces=in_pieces)
    return await _answer(request, job, tier)


async def _answer(request: web.Request, job: NewJob, tier: str | None) -> web.Response:
    app = request.app
    timeout_s = app[keys.SETTINGS].api.sync_timeout_s
    started = time.perf_counter()
    async with attended(app, job) as attendance:
        if not attendance.replayed:
            app[keys.METRICS].job_submitted(job.model, job.endpoint, job.band)
        job_id = attendance.job.id
        if not await attendance.follower.terminal(within_s=timeout_s):
            raise ApiError("deadline_exceeded", job_id=job_id)
    # The last event brings what an answer needs, unless it is large or was missed.
    ended: Ending | Job | None = attendance.follower.ending
    if ended is None:
        ended = record = await final_record(app[keys.QUEUE], job_id, within_s=_RECORD_S)
        if record.status is not Status.COMPLETED or record.output is None:
            raise from_job(record)
    body = ended.output
    assert body is not None
    if tier is not None:
        body = b'%b,"service_tier":"%b"}' % (body[:-1], tier.encode())
    headers = {
        hdrs.CONTENT_TYPE: "application/json",
        "x-job-id": job_id,
        "x-priority": attendance.job.band,
        **limit_headers(attendance.limits),
    }
    if (waited_ms := queue_ms(ended)) is not None:
        headers["x-queue-ms"] = str(waited_ms)
    if attendance.replayed:
        headers.update(REPLAYED)
    else:
        headers["x-overhead-ms"] = str(overhead_ms(ended, time.perf_counter() - started))
    return web.Response(body=body, headers=headers)
