"""What the reference says of webhook endpoints and deliveries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from api.reference.call import Call
from api.schemas import answers as a
from api.schemas import webhook_answers as w
from api.schemas import webhooks

_ENDPOINTS: Final = "/v1/webhook_endpoints"
_ENDPOINT: Final = f"{_ENDPOINTS}/{{endpoint_id}}"
_CHANGE: Final = Call(
    tag="Webhooks",
    summary="Change an endpoint; what isn't given stays",
    body=webhooks.ENDPOINT_CHANGE,
    answers={200: w.WebhookEndpoint},
    example={"name": "orders", "enabled": True},
)

WEBHOOKS: Final[Mapping[str, Call]] = {
    f"POST {_ENDPOINTS}": Call(
        tag="Webhooks",
        summary="Have events sent to a URL; its secret is shown this once",
        body=webhooks.NEW_ENDPOINT,
        answers={200: w.NewWebhookEndpoint},
        example={
            "url": "https://example.com/hooks/forebay",
            "event_types": ["job.completed", "job.failed"],
        },
    ),
    f"GET {_ENDPOINTS}": Call(
        tag="Webhooks",
        summary="List endpoints",
        query=webhooks.ENDPOINT_PAGE,
        answers={200: w.WebhookEndpointPage},
    ),
    "GET /v1/webhook_event_types": Call(
        tag="Webhooks", summary="List event types", answers={200: w.WebhookEventTypes}
    ),
    f"GET {_ENDPOINT}": Call(
        tag="Webhooks", summary="Get an endpoint", answers={200: w.WebhookEndpoint}
    ),
    f"POST {_ENDPOINT}": _CHANGE,
    f"PATCH {_ENDPOINT}": _CHANGE,
    f"DELETE {_ENDPOINT}": Call(
        tag="Webhooks", summary="Delete an endpoint", answers={200: a.Deleted}
    ),
    f"POST {_ENDPOINT}/rotate_secret": Call(
        tag="Webhooks",
        summary="A new secret; the id `jobs` is that of the webhooks of single jobs",
        body=webhooks.ROTATION,
        body_optional=True,
        answers={200: w.RotatedSecret},
        example={"overlap": 3600},
    ),
    f"POST {_ENDPOINT}/test": Call(
        tag="Webhooks",
        summary="Send a test message, or a sample of an event, and wait for the answer",
        body=webhooks.ENDPOINT_TEST,
        body_optional=True,
        example={"event_type": "job.completed"},
        answers={200: w.WebhookTest},
    ),
    f"GET {_ENDPOINT}/deliveries": Call(
        tag="Webhooks",
        summary="List deliveries; the id `jobs` is that of the webhooks of single jobs",
        query=webhooks.DELIVERY_PAGE,
        answers={200: w.WebhookDeliveryPage},
    ),
    "POST /v1/webhook_deliveries/{delivery_id}/redeliver": Call(
        tag="Webhooks", summary="Send a delivery again", answers={202: w.WebhookDelivery}
    ),
}
