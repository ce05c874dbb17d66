"""The body of a new batch, one line of its input, and a batch as its owner sees it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from api.accounts.batch import Batch
from api.schemas.encoding import EmbeddingRequest, ModerationRequest, RerankRequest
from api.schemas.fields import Metadata, Schema
from api.schemas.files import ExpiresAfter
from api.schemas.inference import ChatRequest, CompletionRequest
from api.schemas.responses import ResponseRequest

BatchEndpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/responses",
]
_CustomId = Annotated[str, Field(min_length=1, max_length=512)]


class NewBatch(Schema):
    """Body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchListing(Schema):
    """Query of `GET /v1/batches`."""

    after: Annotated[str, Field(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20


class Envelope(Schema):
    """What a line has around its request; the rest of it is looked at when its turn comes."""

    model_config = ConfigDict(extra="ignore")

    custom_id: _CustomId
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class _Line(Schema):
    custom_id: _CustomId
    method: Literal["POST"]


class ChatLine(_Line):
    url: Literal["/v1/chat/completions"]
    body: ChatRequest


class CompletionLine(_Line):
    url: Literal["/v1/completions"]
    body: CompletionRequest


class EmbeddingLine(_Line):
    url: Literal["/v1/embeddings"]
    body: EmbeddingRequest


class ModerationLine(_Line):
    url: Literal["/v1/moderations"]
    body: ModerationRequest


class RerankLine(_Line):
    url: Literal["/v1/rerank"]
    body: RerankRequest


class ResponseLine(_Line):
    url: Literal["/v1/responses"]
    body: ResponseRequest


Line = ChatLine | CompletionLine | EmbeddingLine | ModerationLine | RerankLine | ResponseLine

NEW_BATCH = TypeAdapter(NewBatch)
ENVELOPE = TypeAdapter(Envelope)
BATCH_LISTING = TypeAdapter(BatchListing)
#: By the batch's endpoint, which all its lines have to name.
LINES: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatLine),
    "/v1/completions": TypeAdapter(CompletionLine),
    "/v1/embeddings": TypeAdapter(EmbeddingLine),
    "/v1/moderations": TypeAdapter(ModerationLine),
    "/v1/rerank": TypeAdapter(RerankLine),
    "/v1/responses": TypeAdapter(ResponseLine),
}


def batch_object(batch: Batch) -> dict[str, Any]:
    """For `orjson.dumps`; OpenAI's shape."""
    ended = _seconds(batch.ended_at)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "model": batch.model,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": _seconds(batch.created_at),
        "in_progress_at": _seconds(batch.in_progress_at),
        "expires_at": _seconds(batch.expires_at),
        "finalizing_at": _seconds(batch.finalizing_at),
        "completed_at": ended if batch.status == "completed" else None,
        "failed_at": ended if batch.status == "failed" else None,
        "expired_at": ended if batch.status == "expired" else None,
        "cancelling_at": _seconds(batch.cancelling_at),
        "cancelled_at": ended if batch.status == "cancelled" else None,
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "usage": _usage(batch) if batch.ended_at is not None else None,
        "metadata": batch.metadata or None,
    }


def _usage(batch: Batch) -> dict[str, Any]:
    used = batch.usage
    return {
        "input_tokens": used.input_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens},
        "output_tokens": used.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.total_tokens,
    }


def _seconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment else None
