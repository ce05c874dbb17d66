"""Jobs that were given up, of all tenants: look at them, put them in again, drop them."""

from __future__ import annotations

import re
from typing import Any, Final

import orjson
from aiohttp import web

from api import keys
from api.errors import ApiError
from api.handlers.jobs import job_id_of
from api.ports import Queue
from api.schemas.dead_letters import PURGE, REPLAY, SELECTION, letter_object
from api.schemas.parsing import parse_query
from broker.stats import DeadLetter
from config.logs import get_logger

log = get_logger(__name__)

#: A place among all letters: queue and letter.
_CURSOR: Final = re.compile(r"(.+):(\d{1,20}-\d{1,20})", re.ASCII)


async def listing(request: web.Request) -> web.Response:
    """`GET /v1/dead_letters`: by model, newest first in each; `next` is where the page ends."""
    wanted = parse_query(SELECTION, request.query)
    queue = request.app[keys.QUEUE]
    names = await queue.queues()
    if wanted.model is not None:
        names = [name for name in names if name == wanted.model]
    first, after = _cursor(wanted.after)
    found: list[tuple[str, DeadLetter]] = []
    for name in names:
        if name < first:
            continue
        letters, _ = await queue.dead_letters(
            name,
            tenant=wanted.tenant,
            after=after if name == first else None,
            # One too many says whether another model has some.
            limit=wanted.limit + 1 - len(found),
        )
        found += [(name, letter) for letter in letters]
        if len(found) > wanted.limit:
            break
    page, more = found[: wanted.limit], len(found) > wanted.limit
    return _json(
        {
            "object": "list",
            "data": [letter_object(name, letter) for name, letter in page],
            "has_more": more,
            "next": f"{page[-1][0]}:{page[-1][1].letter}" if more else None,
        }
    )


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/dead_letters/{job_id}`."""
    return _json(letter_object(*await _find(request)))


async def replay(request: web.Request) -> web.Response:
    """`POST /v1/dead_letters/{job_id}/replay`."""
    name, letter = await _find(request)
    if not letter.alive:
        raise ApiError("result_expired", job_id=letter.job_id)
    ids = await request.app[keys.QUEUE].replay_dead(name, job_id=letter.job_id, limit=1)
    if not ids:
        await _refuse_draining(request, name)
        raise ApiError("queue_full", job_id=letter.job_id)
    return _replayed(request, name, ids)


async def replay_all(request: web.Request) -> web.Response:
    """`POST /v1/dead_letters/replay`: of a model, oldest first, as far as there is room."""
    wanted = parse_query(REPLAY, request.query)
    ids = await request.app[keys.QUEUE].replay_dead(
        wanted.model, tenant=wanted.tenant, limit=wanted.limit
    )
    if not ids:
        await _refuse_draining(request, wanted.model)
    return _replayed(request, wanted.model, ids)


async def purge(request: web.Request) -> web.Response:
    """`DELETE /v1/dead_letters/{job_id}`."""
    name, letter = await _find(request)
    count = await request.app[keys.QUEUE].purge_dead(name, job_id=letter.job_id)
    return _purged(request, name, count)


async def purge_all(request: web.Request) -> web.Response:
    """`DELETE /v1/dead_letters`: of a model, or of a tenant in it."""
    wanted = parse_query(PURGE, request.query)
    count = await request.app[keys.QUEUE].purge_dead(wanted.model, tenant=wanted.tenant)
    return _purged(request, wanted.model, count)


async def _find(request: web.Request) -> tuple[str, DeadLetter]:
    """A job's letter and its queue; the record that knows the queue may be gone."""
    job_id = job_id_of(request)
    queue: Queue = request.app[keys.QUEUE]
    for name in await queue.queues():
        letters, _ = await queue.dead_letters(name, job_id=job_id, limit=1)
        if letters:
            return name, letters[0]
    raise ApiError("not_found", "There is no dead letter of this job.")


async def _refuse_draining(request: web.Request, name: str) -> None:
    """Nothing was put in again: say so where that is because the model takes nothing."""
    if (await request.app[keys.QUEUE].stats(name, top=0)).mode == "draining":
        raise ApiError("queue_draining")


def _cursor(after: str | None) -> tuple[str, str | None]:
    if after is None:
        return "", None
    found = _CURSOR.fullmatch(after)
    if found is None:
        raise ApiError("invalid_request", "It must be the next of a page.", param="after")
    return found[1], found[2]


def _replayed(request: web.Request, queue: str, ids: list[str]) -> web.Response:
    by = request[keys.PRINCIPAL].key_id
    log.info("dead_letters_replayed", queue=queue, count=len(ids), key_id=by)
    return _json({"object": "dead_letter.replay", "replayed": len(ids), "job_ids": ids})


def _purged(request: web.Request, queue: str, count: int) -> web.Response:
    by = request[keys.PRINCIPAL].key_id
    log.info("dead_letters_purged", queue=queue, count=count, key_id=by)
    return _json({"object": "dead_letter.purge", "purged": count})


def _json(document: Any) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")
