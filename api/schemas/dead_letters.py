"""Queries of the calls on dead letters, and a letter as an operator sees it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from api.schemas.fields import ModelName, Schema
from broker.stats import DeadLetter

#: Jobs put in again by one call.
MAX_REPLAYS = 1_000

_Tenant = Annotated[str, Field(max_length=64)]


class Selection(Schema):
    """Query of a listing. Strings come in, so numbers are read leniently."""

    model: ModelName | None = None
    #: Id of a tenant (`ten_…`).
    tenant: _Tenant | None = None
    #: `next` of the page before.
    after: Annotated[str, Field(max_length=400)] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20


class Replay(Schema):
    """Query of `POST /v1/dead_letters/replay`."""

    model: ModelName
    tenant: _Tenant | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_REPLAYS, strict=False)] = MAX_REPLAYS


class Purge(Schema):
    """Query of `DELETE /v1/dead_letters`."""

    model: ModelName
    tenant: _Tenant | None = None


SELECTION = TypeAdapter(Selection)
REPLAY = TypeAdapter(Replay)
PURGE = TypeAdapter(Purge)


def letter_object(queue: str, letter: DeadLetter) -> dict[str, Any]:
    """For `orjson.dumps`; has neither prompt nor output."""
    error = None
    if letter.error is not None:
        error = {
            "code": letter.error.code,
            "message": letter.error.message,
            "param": letter.error.param,
        }
    return {
        "object": "dead_letter",
        "job_id": letter.job_id,
        "model": queue,
        "tenant": letter.tenant,
        "code": letter.code,
        "attempt": letter.attempt,
        "died_at": letter.died_ms // 1000,
        # Once the record has gone there is nothing to put in again.
        "replayable": letter.alive,
        "endpoint": letter.endpoint or None,
        "priority": letter.band,
        "error": error,
    }
