"""What the calls about webhooks answer with, for the reference."""

from __future__ import annotations

from typing import Literal

from pydantic import RootModel

from api.schemas.answers import Answer, Time
from api.schemas.webhooks import EventType, Sample


class WebhookEndpoint(Answer):
    id: str
    object: Literal["webhook_endpoint"]
    name: str
    url: str
    event_types: list[EventType]
    include_output: bool
    enabled: bool
    #: `gone`: it answered 410; `failing`: for too long; `owner`: it was switched off.
    disabled_reason: Literal["gone", "failing", "owner"] | None
    disabled_at: Time | None
    failing_since: Time | None
    last_success_at: Time | None
    last_failure_at: Time | None
    previous_secret_until: Time | None
    created_at: Time
    updated_at: Time


class NewWebhookEndpoint(WebhookEndpoint):
    #: `whsec_…`; shown this once.
    signing_secret: str


class JobsSecret(Answer):
    """The secret of the webhooks of single jobs."""

    id: Literal["jobs"]
    object: Literal["webhook_endpoint"]
    signing_secret: str


class RotatedSecret(RootModel[NewWebhookEndpoint | JobsSecret]):
    """Of an endpoint, or of the webhooks of single jobs where its id is `jobs`."""


class WebhookEndpointPage(Answer):
    object: Literal["list"]
    data: list[WebhookEndpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None


class WebhookEventTypes(Answer):
    object: Literal["list"]
    data: list[Sample]


class WebhookTest(Answer):
    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: Literal["webhook_endpoint.test", Sample]
    success: bool
    status_code: int | None
    error: str | None
    delivery_id: str | None


class WebhookAttempt(Answer):
    #: Unix milliseconds.
    at_ms: int
    duration_ms: int
    status_code: int | None
    error: str | None


class WebhookDelivery(Answer):
    id: str
    object: Literal["webhook_delivery"]
    #: Null for the webhook of a single job.
    webhook_endpoint_id: str | None
    job_id: str | None
    event_id: str
    event_type: str
    url: str
    state: Literal["pending", "delivered", "failed", "discarded"]
    created_at: Time
    next_attempt_at: Time | None
    ended_at: Time | None
    attempts: list[WebhookAttempt]


class WebhookDeliveryPage(Answer):
    object: Literal["list"]
    data: list[WebhookDelivery]
    has_more: bool
    first_id: str | None
    last_id: str | None
