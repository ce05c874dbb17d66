"""What the calls about files and batches answer with, for the reference."""

from __future__ import annotations

from typing import Literal

from api.schemas.answers import Answer, Metadata, Time
from api.schemas.batches import BatchEndpoint


class FileObject(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: Time
    expires_at: Time | None
    filename: str
    purpose: Literal["batch", "batch_output", "user_data"]
    status: Literal["processed"]
    status_details: None


class FilePage(Answer):
    object: Literal["list"]
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class BatchProblem(Answer):
    """What is wrong with the input file."""

    code: str
    #: Counted from 1; null where it isn't about one line.
    line: int | None
    message: str
    param: str | None


class BatchProblems(Answer):
    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(Answer):
    total: int
    completed: int
    failed: int


class BatchInputDetails(Answer):
    cached_tokens: int


class BatchOutputDetails(Answer):
    reasoning_tokens: int


class BatchUsage(Answer):
    """Tokens of all lines that were done."""

    input_tokens: int
    input_tokens_details: BatchInputDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class BatchObject(Answer):
    id: str
    object: Literal["batch"]
    endpoint: BatchEndpoint
    errors: BatchProblems | None
    input_file_id: str
    #: The one that all lines name; null where they name several.
    model: str | None
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: Time
    in_progress_at: Time | None
    expires_at: Time
    finalizing_at: Time | None
    completed_at: Time | None
    failed_at: Time | None
    expired_at: Time | None
    cancelling_at: Time | None
    cancelled_at: Time | None
    request_counts: BatchCounts
    #: Null until the batch has ended.
    usage: BatchUsage | None
    metadata: Metadata | None


class BatchPage(Answer):
    object: Literal["list"]
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
