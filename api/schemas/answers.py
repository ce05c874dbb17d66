"""What calls answer with, for the reference. Handlers write JSON by hand, because it is faster;
tests hold every answer to these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from broker.jobs import Band, Status
from config.catalogue import Kind

Metadata = dict[str, str]
#: Unix seconds.
Time = int


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class JobFailure(Answer):
    code: str
    message: str
    param: str | None


class JobPlace(Answer):
    position: int
    estimated_start_ms: int | None


class JobUsage(Answer):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cached_tokens: int
    queue_ms: int | None
    run_ms: int | None


class JobUrls(Answer):
    self: str
    events: str
    cancel: str


class ListedJob(Answer):
    id: str
    object: Literal["job"]
    status: Status
    endpoint: str
    model: str
    priority: Band
    metadata: Metadata
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    expires_at: Time | None
    deadline_at: Time | None
    erased_at: Time | None
    attempt: int
    max_attempts: int
    queue: JobPlace | None
    error: JobFailure | None
    usage: JobUsage | None
    urls: JobUrls


class JobObject(ListedJob):
    #: The usual answer of the endpoint, once completed.
    output: dict[str, Any] | None


class JobPage(Answer):
    object: Literal["list"]
    data: list[ListedJob]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Cancelled(Answer):
    id: str
    result: Literal["cancelled", "cancelling", "terminal", "not_found"]


class CancelledPage(Answer):
    object: Literal["list"]
    data: list[Cancelled]


class Deleted(Answer):
    id: str
    #: A file's is OpenAI's own odd one out.
    object: Literal[
        "job.deleted",
        "response.deleted",
        "conversation.deleted",
        "file",
        "webhook_endpoint.deleted",
    ]
    deleted: Literal[True]


class CachedTokens(Answer):
    cached_tokens: int


class Tokens(Answer):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: Time
    model: str
    choices: list[ChatChoice]
    usage: Tokens
    system_fingerprint: str | None = None
    service_tier: str | None = None


class TextChoice(Answer):
    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"]
    created: Time
    model: str
    choices: list[TextChoice]
    usage: Tokens
    system_fingerprint: str | None = None
    service_tier: str | None = None


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    #: Numbers, or with `encoding_format: base64` little-endian float32.
    embedding: list[float] | str


class EmbeddingPage(Answer):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Tokens
    system_fingerprint: str | None = None
    service_tier: str | None = None


class Verdict(Answer):
    flagged: bool
    #: By the labels of the model.
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class Moderations(Answer):
    id: str
    model: str
    results: list[Verdict]
    usage: Tokens
    service_tier: str | None = None


class Document(Answer):
    text: str


class Ranked(Answer):
    #: Of the document in the request.
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(Answer):
    id: str
    object: Literal["list"]
    model: str
    #: The best first.
    results: list[Ranked]
    usage: Tokens
    service_tier: str | None = None


class ContentPart(Answer):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Answer):
    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["system", "user", "assistant"]
    content: list[ContentPart]


class ItemPage(Answer):
    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ResponseFailure(Answer):
    code: str
    message: str


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Reference(Answer):
    id: str


class ResponseObject(Answer):
    id: str
    object: Literal["response"]
    created_at: Time
    completed_at: Time | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: Reference | None
    service_tier: str
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    metadata: Metadata


class ConversationObject(Answer):
    id: str
    object: Literal["conversation"]
    created_at: Time
    metadata: Metadata


class Model(Answer):
    id: str
    object: Literal["model"]
    created: Time
    owned_by: str
    kind: Kind
    endpoints: list[str]
    context_tokens: int
    max_output_tokens: int | None
    description: str


class ModelPage(Answer):
    object: Literal["list"]
    data: list[Model]


class BandState(Answer):
    waiting: int
    oldest_ms: int


class QueueState(Answer):
    object: Literal["queue"]
    model: str
    mode: Literal["running", "paused", "draining"]
    priorities: dict[Band, BandState]
    delayed: int
    running: int
    jobs_per_s: float
    tokens_per_s: float


class QueuePage(Answer):
    object: Literal["list"]
    data: list[QueueState]


class HourOfUsage(Answer):
    object: Literal["usage"]
    hour: Time
    model: str
    completed: int
    failed: int
    cancelled: int
    expired: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int


class UsagePage(Answer):
    object: Literal["list"]
    since: Time
    until: Time
    data: list[HourOfUsage]


class DeadLetterObject(Answer):
    object: Literal["dead_letter"]
    job_id: str
    model: str
    tenant: str
    code: str
    attempt: int
    died_at: Time
    replayable: bool
    endpoint: str | None
    priority: Band | None
    error: JobFailure | None


class DeadLetterPage(Answer):
    object: Literal["list"]
    data: list[DeadLetterObject]
    has_more: bool
    next: str | None


class Replayed(Answer):
    object: Literal["dead_letter.replay"]
    replayed: int
    job_ids: list[str]


class Purged(Answer):
    object: Literal["dead_letter.purge"]
    purged: int


class Alive(Answer):
    status: Literal["ok"]


class WorkerCounts(Answer):
    ready_workers: int
    loading_workers: int


class Readiness(Answer):
    status: Literal["ready", "unready"]
    missing: list[str]
    models: dict[str, WorkerCounts]


class ErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str
    job_id: str | None = None


class ErrorObject(Answer):
    error: ErrorBody
