"""`/v1/batches`: many requests from a file, done within a day."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from aiohttp import web

from api import keys
from api.accounts.batch import Batch
from api.accounts.batches import TooManyBatchesError, UnknownInputError
from api.auth.principal import Principal
from api.batches.runner import BatchRunner
from api.errors import ApiError
from api.files.ids import new_batch_id
from api.handlers.body import read_body
from api.handlers.files import json, storage
from api.schemas.batches import BATCH_LISTING, NEW_BATCH, batch_object
from api.schemas.files import page_object
from api.schemas.parsing import parse, parse_query
from config.logs import get_logger

log = get_logger(__name__)

_WINDOW: Final = timedelta(hours=24)
_BATCH_ID: Final = re.compile(r"batch_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)


async def create(request: web.Request) -> web.Response:
    """`POST /v1/batches`."""
    wanted = parse(NEW_BATCH, await read_body(request))
    principal = request[keys.PRINCIPAL]
    settings = request.app[keys.SETTINGS].batches
    now = datetime.now(UTC)
    batch = Batch(
        id=new_batch_id(),
        tenant=principal.tenant,
        key_id=principal.key_id,
        endpoint=wanted.endpoint,
        input_file_id=wanted.input_file_id,
        metadata=dict(wanted.metadata or {}),
        window=_window(principal, settings.window),
        output_ttl_s=wanted.output_expires_after.seconds if wanted.output_expires_after else None,
        created_at=now,
        expires_at=now + _WINDOW,
    )
    async with storage(request) as library:
        runner = request.app[keys.BATCHES]
        try:
            await library.sql(
                lambda: runner.records.add(batch, max_unfinished=settings.max_unfinished)
            )
        except UnknownInputError:
            raise ApiError(
                "file_not_found", "There is no such file of purpose batch.", param="input_file_id"
            ) from None
        except TooManyBatchesError:
            message = f"You have {settings.max_unfinished} batches that have not ended."
            raise ApiError("too_many_batches", message) from None
    log.info("batch_created", batch_id=batch.id, endpoint=batch.endpoint)
    runner.look()
    return json(batch_object(batch))


async def listing(request: web.Request) -> web.Response:
    """`GET /v1/batches`, newest first."""
    wanted = parse_query(BATCH_LISTING, request.query)
    tenant = request[keys.PRINCIPAL].tenant
    async with storage(request) as library:
        runner = request.app[keys.BATCHES]
        batches, more = await library.sql(
            lambda: runner.records.page(tenant, after=wanted.after, limit=wanted.limit)
        )
    return json(page_object([_shown(runner, batch) for batch in batches], more=more))


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/batches/{id}`."""
    batch_id, tenant = _batch_id(request), request[keys.PRINCIPAL].tenant
    async with storage(request) as library:
        runner = request.app[keys.BATCHES]
        batch = await library.sql(lambda: runner.records.get(batch_id, tenant=tenant))
    if batch is None:
        raise ApiError("batch_not_found")
    return json(_shown(runner, batch))


async def cancel(request: web.Request) -> web.Response:
    """`POST /v1/batches/{id}/cancel`: what is done stays in the output file."""
    batch_id, tenant = _batch_id(request), request[keys.PRINCIPAL].tenant
    async with storage(request) as library:
        runner = request.app[keys.BATCHES]
        now = datetime.now(UTC)
        batch = await library.sql(lambda: runner.records.cancel(batch_id, tenant=tenant, now=now))
    if batch is None:
        raise ApiError("batch_not_found")
    if batch.status not in ("cancelling", "cancelled"):
        raise ApiError("batch_ended", f"The batch is {batch.status}; it can't be cancelled.")
    log.info("batch_cancel_wanted", batch_id=batch_id)
    runner.cancel(batch_id)
    return json(_shown(runner, batch))


def _window(principal: Principal, most: int) -> int:
    """Jobs of a batch at once: never so many that the tenant's other calls find no room."""
    return max(1, min(most, principal.policy.max_queued // 2))


def _shown(runner: BatchRunner, batch: Batch) -> dict[str, object]:
    return batch_object(runner.progress(batch))


def _batch_id(request: web.Request) -> str:
    batch_id = request.match_info["batch_id"]
    if not _BATCH_ID.fullmatch(batch_id):
        raise ApiError("batch_not_found")
    return batch_id
