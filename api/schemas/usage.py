"""Query of `GET /v1/usage`, and what it answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from api.schemas.fields import ModelName, Schema
from broker.usage import MOST_HOURS, HourUsage, TenantUsage


class UsageQuery(Schema):
    """Strings come in, so numbers are read leniently."""

    #: The running hour is the last one.
    hours: Annotated[int, Field(ge=1, le=MOST_HOURS, strict=False)] = 24
    model: ModelName | None = None
    #: Id of a tenant (`ten_…`); another one than the key's needs the scope `admin`.
    tenant: Annotated[str, Field(min_length=1, max_length=64)] | None = None


USAGE = TypeAdapter(UsageQuery)


def usage_page(usage: TenantUsage) -> dict[str, Any]:
    """For `orjson.dumps`."""
    return {
        "object": "list",
        "since": usage.since_ms // 1000,
        "until": usage.until_ms // 1000,
        "data": [_shown(each) for each in usage.hours],
    }


def _shown(each: HourUsage) -> dict[str, Any]:
    return {
        "object": "usage",
        "hour": each.hour_ms // 1000,
        "model": each.model,
        "completed": each.completed,
        "failed": each.failed,
        "cancelled": each.cancelled,
        "expired": each.expired,
        "input_tokens": each.input_tokens,
        "cached_tokens": each.cached_tokens,
        "output_tokens": each.output_tokens,
    }
