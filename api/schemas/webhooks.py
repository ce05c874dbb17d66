"""Requests about webhooks, and endpoints and deliveries as their owner sees them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from api.accounts.webhooks import StoredEndpoint
from api.schemas.fields import Schema
from broker.webhooks.deliveries import Delivery
from broker.webhooks.endpoints import Health
from broker.webhooks.urls import MAX_URL

#: A week: longer than any retry.
MAX_OVERLAP_S = 604_800
DEFAULT_OVERLAP_S = 86_400.0

Sample = Literal[
    "job.completed",
    "job.failed",
    "job.cancelled",
    "job.expired",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "webhook_endpoint.disabled",
]
EventType = Literal["*", Sample]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=16)]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL)]
Name = Annotated[str, Field(max_length=100)]


class NewEndpoint(Schema):
    """Body of `POST /v1/webhook_endpoints`."""

    url: Url
    event_types: EventTypes = ["*"]  # noqa: RUF012
    name: Name = ""
    include_output: bool = False


class EndpointChange(Schema):
    """Body of `POST` and `PATCH /v1/webhook_endpoints/{id}`: what isn't given stays."""

    url: Url | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    include_output: bool | None = None
    enabled: bool | None = None


class Rotation(Schema):
    """Body of `POST /v1/webhook_endpoints/{id}/rotate_secret`, which may be absent."""

    #: Seconds for which the secret before signs as well.
    overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP_S)] | None = None
    #: The same as OpenAI's SDK says it.
    keep_old_secret_active_for_24_hours: bool | None = None

    @property
    def overlap_s(self) -> float:
        if self.overlap is not None:
            return self.overlap
        return 0.0 if self.keep_old_secret_active_for_24_hours is False else DEFAULT_OVERLAP_S


class EndpointTest(Schema):
    """Body of `POST /v1/webhook_endpoints/{id}/test`, which may be absent."""

    #: Send a sample of this event instead of `webhook_endpoint.test`.
    event_type: Sample | None = None


class EndpointPage(Schema):
    """Query of a listing. Strings come in, so numbers are read leniently."""

    after: Annotated[str, Field(max_length=64)] = ""
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20


class DeliveryPage(EndpointPage):
    state: Literal["pending", "delivered", "failed", "discarded"] | None = None


NEW_ENDPOINT = TypeAdapter(NewEndpoint)
ENDPOINT_CHANGE = TypeAdapter(EndpointChange)
ROTATION = TypeAdapter(Rotation)
ENDPOINT_TEST = TypeAdapter(EndpointTest)
ENDPOINT_PAGE = TypeAdapter(EndpointPage)
DELIVERY_PAGE = TypeAdapter(DeliveryPage)


def endpoint_object(stored: StoredEndpoint, health: Health | None = None) -> dict[str, Any]:
    """For `orjson.dumps`. Times are Unix seconds; without `health` nothing was sent yet."""
    endpoint, seen = stored.endpoint, health or Health()
    disabled = not endpoint.enabled or seen.disabled_ms > 0
    return {
        "id": stored.id,
        "object": "webhook_endpoint",
        "name": stored.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "include_output": endpoint.include_output,
        "enabled": not disabled,
        # `gone`: it answered 410; `failing`: for too long; `owner`: it was switched off.
        "disabled_reason": (seen.reason or "owner") if disabled else None,
        "disabled_at": _seconds(seen.disabled_ms),
        "failing_since": _seconds(seen.failing_ms),
        "last_success_at": _seconds(seen.succeeded_ms),
        "last_failure_at": _seconds(seen.failed_ms),
        "previous_secret_until": _seconds(endpoint.signing.previous_until_ms),
        "created_at": int(stored.created_at.timestamp()),
        "updated_at": int(stored.updated_at.timestamp()),
    }


def delivery_object(delivery: Delivery) -> dict[str, Any]:
    """For `orjson.dumps`. Holds neither the message nor anything of an answer but its status."""
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": delivery.endpoint or None,
        "job_id": delivery.job or None,
        "event_id": delivery.event_id,
        "event_type": delivery.event_type,
        "url": delivery.url,
        "state": delivery.state,
        "created_at": _seconds(delivery.created_ms),
        "next_attempt_at": _seconds(delivery.next_ms) if delivery.state == "pending" else None,
        "ended_at": _seconds(delivery.ended_ms),
        "attempts": [
            {
                "at_ms": one.ms,
                "duration_ms": one.duration_ms,
                "status_code": one.status or None,
                "error": one.error or None,
            }
            for one in delivery.tries
        ],
    }


def _seconds(unix_ms: int) -> int | None:
    return unix_ms // 1000 if unix_ms else None
