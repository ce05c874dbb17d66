"""The job as its owner sees it."""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from api.schemas.response_object import is_response, response_object
from broker.jobs import Job, NewJob, Status
from broker.stats import Position


def urls(job_id: str) -> dict[str, str]:
    """Relative, so that they hold behind any proxy."""
    base = f"/v1/jobs/{job_id}"
    return {"self": base, "events": f"{base}/events", "cancel": f"{base}/cancel"}


def accepted_object(job: NewJob, *, created_ms: int, position: int) -> bytes:
    """A job that was just enqueued: what `job_object` would say of it, without reading it back."""
    return orjson.dumps(
        {
            "id": job.id,
            "object": "job",
            "status": Status.QUEUED,
            "endpoint": job.endpoint,
            "model": job.model,
            "priority": job.band,
            "metadata": orjson.Fragment(job.metadata),
            "created_at": created_ms // 1000,
            "started_at": None,
            "completed_at": None,
            "expires_at": None,
            "deadline_at": _seconds(job.deadline_ms),
            "erased_at": None,
            "attempt": 0,
            "max_attempts": job.max_attempts,
            # What it takes to know more is a second call, and few submits need it.
            "queue": {"position": position, "estimated_start_ms": None},
            "error": None,
            "usage": None,
            "urls": urls(job.id),
            "output": None,
        }
    )


def job_object(
    job: Job, *, position: Position | None = None, with_output: bool = True
) -> dict[str, Any]:
    """For `orjson.dumps`. Times are Unix seconds; a listing has no output."""
    error = None
    if job.error is not None:
        error = {
            "code": job.error.code,
            "message": job.error.message,
            "param": job.error.param,
        }
    usage = None
    if job.is_terminal:
        usage = {
            "input_tokens": job.usage.input_tokens,
            "output_tokens": job.usage.output_tokens,
            "total_tokens": job.usage.total_tokens,
            "cached_tokens": job.usage.cached_tokens,
            "queue_ms": queue_ms(job),
            "run_ms": job.finished_ms - job.started_ms if job.started_ms else None,
        }
    expires_ms = 0
    if job.is_terminal and not job.erased_ms:
        expires_ms = job.finished_ms + job.result_ttl_s * 1000
    shown: dict[str, Any] = {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "endpoint": job.endpoint,
        "model": job.model,
        "priority": job.band,
        "metadata": orjson.Fragment(job.metadata),
        "created_at": job.created_ms // 1000,
        "started_at": _seconds(job.started_ms),
        "completed_at": _seconds(job.finished_ms),
        "expires_at": _seconds(expires_ms),
        "deadline_at": _seconds(job.deadline_ms),
        "erased_at": _seconds(job.erased_ms),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "queue": None
        if position is None
        else {
            "position": position.position,
            "estimated_start_ms": position.estimated_start_ms,
        },
        "error": error,
        "usage": usage,
        "urls": urls(job.id),
    }
    if with_output:
        shown["output"] = rendered_output(job)
    return shown


def rendered_output(job: Job) -> Any:
    """The answer of a job's endpoint, for `orjson.dumps`; workers answer a response as a chat."""
    if not job.output:
        return None
    return response_object(job) if is_response(job) else orjson.Fragment(job.output)


class Timed(Protocol):
    """A job's times (Unix ms, 0 when not yet)."""

    @property
    def created_ms(self) -> int: ...

    @property
    def started_ms(self) -> int: ...

    @property
    def finished_ms(self) -> int: ...


def queue_ms(job: Timed) -> int | None:
    """Time from the enqueue to the start of the latest attempt."""
    return job.started_ms - job.created_ms if job.started_ms else None


def overhead_ms(job: Timed, wall_s: float) -> int:
    """What of a call's `wall_s` its ended job took no part in."""
    return max(0, round(wall_s * 1000) - (job.finished_ms - job.created_ms))


def _seconds(unix_ms: int) -> int | None:
    return unix_ms // 1000 if unix_ms else None
