"""Every error the API can answer with: one table of codes, and their rendering.

Bodies have OpenAI's shape, `{"error": {message, type, param, code, request_id, job_id?}}`; whoever
accepts `application/problem+json` gets RFC 9457. Messages never repeat what the caller sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from api.limit_headers import limit_headers
from broker.errors import (
    BrokerError,
    BrokerUnavailableError,
    IdempotencyConflictError,
    JobNotFoundError,
    NotRetryableError,
    OverloadedError,
    QueueDrainingError,
    QueueFullError,
    RateLimitedError,
)
from broker.jobs import Job, Status

_REQUEST = "invalid_request_error"
_LIMIT = "rate_limit_error"
_SERVER = "server_error"


@dataclass(frozen=True, slots=True)
class Code:
    """A row of the table."""

    status: int
    #: OpenAI's `type`.
    type: str
    #: The same request may succeed later without a change.
    retryable: bool
    #: RFC 9457 title, and the message where none is more precise.
    title: str


CODES: Final[Mapping[str, Code]] = {
    "invalid_request": Code(400, _REQUEST, False, "The request is not valid"),
    "unsupported_parameter": Code(400, _REQUEST, False, "A parameter is not supported"),
    "context_length_exceeded": Code(400, _REQUEST, False, "The input exceeds the model's context"),
    "invalid_api_key": Code(401, "authentication_error", False, "No valid credential was given"),
    "insufficient_scope": Code(403, "permission_error", False, "The credential lacks a scope"),
    "parameter_not_allowed": Code(
        403, "permission_error", False, "The tenant may not use a parameter"
    ),
    "not_found": Code(404, _REQUEST, False, "There is nothing at this address"),
    "job_not_found": Code(404, _REQUEST, False, "There is no such job"),
    "model_not_found": Code(404, _REQUEST, False, "There is no such model"),
    "file_not_found": Code(404, _REQUEST, False, "There is no such file"),
    "batch_not_found": Code(404, _REQUEST, False, "There is no such batch"),
    "method_not_allowed": Code(405, _REQUEST, False, "The method is not allowed here"),
    "request_timeout": Code(408, _REQUEST, True, "The request body did not arrive in time"),
    "cancelled": Code(409, _REQUEST, False, "The job was cancelled"),
    "not_retryable": Code(409, _REQUEST, False, "The job has neither failed nor expired"),
    "conversation_locked": Code(409, _REQUEST, True, "A response of the conversation still runs"),
    "file_in_use": Code(409, _REQUEST, False, "A batch that has not ended reads the file"),
    "batch_ended": Code(409, _REQUEST, False, "The batch has ended"),
    "result_expired": Code(410, _REQUEST, False, "The result is no longer kept"),
    "payload_too_large": Code(413, _REQUEST, False, "The request body is too large"),
    "unsupported_media_type": Code(415, _REQUEST, False, "The body has an unsupported form"),
    "range_not_satisfiable": Code(416, _REQUEST, False, "The file has no such range"),
    "idempotency_key_reused": Code(422, _REQUEST, False, "The idempotency key was used before"),
    "authentication_limited": Code(429, _LIMIT, False, "Too many failed logins"),
    "queue_full": Code(429, _LIMIT, True, "The queue is full"),
    "rate_limit_exceeded": Code(429, _LIMIT, True, "Too many requests"),
    "tokens_exceeded": Code(429, _LIMIT, True, "Too many tokens"),
    "concurrency_exceeded": Code(429, _LIMIT, True, "Too many requests at once"),
    "budget_exceeded": Code(429, "insufficient_quota", False, "The budget is used up"),
    "storage_quota_exceeded": Code(
        429, "insufficient_quota", False, "The space for files is used up"
    ),
    "too_many_batches": Code(429, _LIMIT, True, "Too many batches have not ended"),
    "too_many_conversations": Code(
        429, "insufficient_quota", False, "Too many conversations are kept"
    ),
    "internal_error": Code(500, _SERVER, True, "Something went wrong on our side"),
    "worker_lost": Code(502, _SERVER, True, "The worker was lost while it ran the job"),
    "max_attempts": Code(502, _SERVER, False, "The job failed at every attempt"),
    "broker_unavailable": Code(503, _SERVER, True, "The queue can't be reached"),
    "accounts_unavailable": Code(503, _SERVER, True, "Accounts are not loaded yet"),
    "storage_unavailable": Code(503, _SERVER, True, "Files and batches can't be reached"),
    "overloaded": Code(503, _SERVER, True, "Too many jobs wait for the model"),
    "queue_draining": Code(503, _SERVER, True, "The model takes no new jobs for now"),
    "shutting_down": Code(503, _SERVER, True, "The server is shutting down"),
    "out_of_memory": Code(503, _SERVER, True, "The model ran out of memory"),
    "deadline_exceeded": Code(504, _SERVER, False, "The job did not finish in time"),
    "execution_timeout": Code(504, _SERVER, False, "The job ran for too long"),
    "storage_full": Code(507, _SERVER, True, "There is no room left for files"),
}

#: Seconds a caller is asked to wait, where nothing better is known.
_RETRY_AFTER_S: Final[Mapping[str, float]] = {
    "queue_full": 5.0,
    "queue_draining": 30.0,
    "budget_exceeded": 3600.0,
    "storage_quota_exceeded": 3600.0,
    "too_many_batches": 30.0,
    "too_many_conversations": 3600.0,
}
_DEFAULT_RETRY_AFTER_S: Final = 1.0

#: Errors that aiohttp raises by itself.
_BY_STATUS: Final[Mapping[int, str]] = {
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
}

#: Code and unit of a limit by what it counts.
_LIMITED: Final[Mapping[str, tuple[str, str]]] = {
    "requests": ("rate_limit_exceeded", "requests per minute"),
    "tokens": ("tokens_exceeded", "tokens per minute"),
    "jobs": ("concurrency_exceeded", "jobs at once"),
}

_PROBLEM: Final = "application/problem+json"


class ApiError(Exception):
    """An answer other than success; `code` is a row of `CODES`."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        param: str | None = None,
        job_id: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        row = CODES[code]
        self.message = message or row.title
        super().__init__(code)
        self.code = code
        self.param = param
        self.job_id = job_id
        self.status = row.status
        self.retry_after_s = retry_after_s
        self.headers = headers


def from_broker(error: BrokerError) -> ApiError:
    """What a failure of the broker means to the caller."""
    if isinstance(error, OverloadedError):
        message = (
            f"The model has {error.limit} jobs waiting, beyond which no {error.band} job is taken."
        )
        return ApiError("overloaded", message, retry_after_s=error.retry_after_ms / 1000)
    if isinstance(error, QueueFullError):
        message = f"Your queue is full ({error.limit} jobs); try again later."
        return ApiError("queue_full", message, retry_after_s=error.retry_after_ms / 1000)
    if isinstance(error, RateLimitedError):
        code, unit = _LIMITED[error.kind]
        whose = "This key's" if error.scope == "key" else "Your"
        return ApiError(
            code,
            f"{whose} limit of {error.limit} {unit} is reached.",
            retry_after_s=error.retry_after_ms / 1000,
            headers=limit_headers(error.limits),
        )
    if isinstance(error, QueueDrainingError):
        return ApiError("queue_draining")
    if isinstance(error, IdempotencyConflictError):
        return ApiError("idempotency_key_reused", job_id=error.job_id)
    if isinstance(error, NotRetryableError):
        message = f"The job is {error.status}; only failed and expired jobs can be retried."
        return ApiError("not_retryable", message, job_id=error.job_id)
    if isinstance(error, BrokerUnavailableError):
        return ApiError("broker_unavailable")
    if isinstance(error, JobNotFoundError):
        return ApiError("job_not_found")
    return ApiError("internal_error")


def from_aiohttp(error: web.HTTPException) -> ApiError:
    """The same for what aiohttp refuses by itself."""
    default = "invalid_request" if error.status < 500 else "internal_error"
    code = _BY_STATUS.get(error.status, default)
    allow = error.headers.get(hdrs.ALLOW)
    return ApiError(code, headers={hdrs.ALLOW: allow} if allow else None)


def from_job(job: Job) -> ApiError:
    """Why a terminal job has no output."""
    if job.erased_ms:
        return ApiError("result_expired", job_id=job.id)
    if job.status is Status.CANCELLED:
        return ApiError("cancelled", job_id=job.id)
    if job.status is Status.EXPIRED:
        return ApiError("deadline_exceeded", job_id=job.id)
    if job.error is None or job.error.code not in CODES:
        return ApiError("internal_error", job_id=job.id)
    return ApiError(job.error.code, job.error.message, param=job.error.param, job_id=job.id)


def error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """OpenAI's error object; also what an event stream carries after its headers are gone."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": CODES[error.code].type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }
    if error.job_id is not None:
        body["job_id"] = error.job_id
    return body


def render(error: ApiError, request: web.BaseRequest, request_id: str) -> web.Response:
    """The whole answer to a request that failed before any of it was sent."""
    row = CODES[error.code]
    body = error_object(error, request_id)
    if _PROBLEM in request.headers.get(hdrs.ACCEPT, ""):
        content_type = _PROBLEM
        document: dict[str, Any] = {
            **body,
            "type": f"urn:forebay:error:{error.code}",
            "title": row.title,
            "status": row.status,
            "detail": body.pop("message"),
        }
        document.pop("message")
    else:
        content_type = "application/json"
        document = {"error": body}
    headers = dict(error.headers or {})
    if row.status in (429, 503):
        wait_s = error.retry_after_s or _RETRY_AFTER_S.get(error.code, _DEFAULT_RETRY_AFTER_S)
        headers[hdrs.RETRY_AFTER] = str(max(1, ceil(wait_s)))
        headers["retry-after-ms"] = str(round(wait_s * 1000))
    elif row.status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="forebay"'
    if not row.retryable and row.status in (409, 429, 500, 502, 504):
        # OpenAI's SDKs repeat these by themselves unless told not to.
        headers["x-should-retry"] = "false"
    return web.Response(
        status=row.status,
        body=orjson.dumps(document),
        content_type=content_type,
        headers=headers,
    )
