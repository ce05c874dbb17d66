"""The native job calls: submission, and the query of a listing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, TypeAdapter

from api.schemas.encoding import EmbeddingRequest, ModerationRequest, RerankRequest
from api.schemas.fields import Metadata, Schema, unix_time
from api.schemas.inference import ChatRequest, CompletionRequest, InferenceRequest
from api.schemas.responses import ResponseRequest
from broker.jobs import Band, Status
from broker.webhooks.urls import MAX_URL

#: 30 days.
MAX_TTL_S = 30 * 86_400
#: 7 days: within the time for which a job is listed.
MAX_DELAY_S = 7 * 86_400
MAX_EXECUTION_S = 86_400


#: Unix seconds; RFC 3339 comes in as well. The bounds tell milliseconds and spans of time from it.
Moment = Annotated[
    float, Field(ge=1e9, le=1e10), BeforeValidator(unix_time, json_schema_input_type=float | str)
]
#: Jobs cancelled by one call.
MAX_CANCELS = 1_000


class Webhook(Schema):
    """Where the end of a job is told to."""

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL)]
    events: Annotated[
        list[Literal["job.completed", "job.failed", "job.cancelled", "job.expired"]],
        Field(min_length=1, max_length=4),
    ] = ["job.completed", "job.failed", "job.cancelled", "job.expired"]  # noqa: RUF012
    include_output: bool = False


class _Submission(Schema):
    priority: Literal["interactive", "standard", "batch"] | None = None
    metadata: Metadata | None = None
    #: Seconds the finished job stays readable.
    ttl: Annotated[int, Field(ge=1, le=MAX_TTL_S)] | None = None
    #: False: the finished job stays readable for a short time only.
    store: bool | None = None
    #: Starts the job may have, crashes included.
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = None
    #: Until which the job has to be started.
    deadline: Moment | None = None
    #: Seconds one attempt may run.
    execution_timeout: Annotated[float, Field(ge=0.001, le=MAX_EXECUTION_S)] | None = None
    #: Seconds before which the job isn't started.
    delay: Annotated[float, Field(ge=0, le=MAX_DELAY_S)] | None = None
    webhook: Webhook | None = None


class ChatSubmission(_Submission):
    endpoint: Literal["/v1/chat/completions"]
    body: ChatRequest


class CompletionSubmission(_Submission):
    endpoint: Literal["/v1/completions"]
    body: CompletionRequest


class EmbeddingSubmission(_Submission):
    endpoint: Literal["/v1/embeddings"]
    body: EmbeddingRequest


class ModerationSubmission(_Submission):
    endpoint: Literal["/v1/moderations"]
    body: ModerationRequest


class RerankSubmission(_Submission):
    endpoint: Literal["/v1/rerank"]
    body: RerankRequest


class ResponseSubmission(_Submission):
    endpoint: Literal["/v1/responses"]
    body: ResponseRequest


Submission = (
    ChatSubmission
    | CompletionSubmission
    | EmbeddingSubmission
    | ModerationSubmission
    | RerankSubmission
    | ResponseSubmission
)

SUBMISSION: TypeAdapter[Submission] = TypeAdapter(
    Annotated[Submission, Field(discriminator="endpoint")]
)
CHAT = TypeAdapter(ChatRequest)
COMPLETION = TypeAdapter(CompletionRequest)
EMBEDDING = TypeAdapter(EmbeddingRequest)
MODERATION = TypeAdapter(ModerationRequest)
RERANK = TypeAdapter(RerankRequest)

ENDPOINTS: dict[str, type[InferenceRequest]] = {
    request.endpoint: request
    for request in (
        ChatRequest,
        CompletionRequest,
        EmbeddingRequest,
        ModerationRequest,
        RerankRequest,
    )
}


class Retry(Schema):
    """Body of `POST /v1/jobs/{id}/retry`, which may be absent."""

    deadline: Moment | None = None


class Cancels(Schema):
    """Body of `POST /v1/jobs/cancel`."""

    ids: Annotated[
        list[Annotated[str, Field(max_length=64)]],
        Field(min_length=1, max_length=MAX_CANCELS, fail_fast=True),
    ]


RETRY = TypeAdapter(Retry)
CANCELS = TypeAdapter(Cancels)


class Listing(Schema):
    """Query of `GET /v1/jobs`. Strings come in, so these are read leniently."""

    status: Status | None = None
    model: Annotated[str, Field(max_length=256)] | None = None
    priority: Band | None = None
    #: Unix seconds.
    created_after: Annotated[float, Field(ge=0, le=1e11, strict=False)] | None = None
    after: Annotated[str, Field(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20
    order: Literal["asc", "desc"] = "desc"


class Wait(Schema):
    """Query of `GET /v1/jobs/{id}`."""

    #: Seconds.
    wait: Annotated[float, Field(ge=0, lt=1e12, strict=False)] | None = None


class Following(Schema):
    """Query of `GET /v1/jobs/{id}/events`."""

    starting_after: Annotated[int, Field(ge=0, lt=10**15, strict=False)] | None = None


LISTING = TypeAdapter(Listing)
#: For the reference; handlers read these leniently.
WAIT = TypeAdapter(Wait)
FOLLOWING = TypeAdapter(Following)
