"""The error table, and that everything which fails is answered from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from api import keys
from api.errors import CODES, ApiError, from_broker, from_job, render
from broker.errors import (
    BrokerError,
    BrokerUnavailableError,
    DuplicateJobError,
    JobNotFoundError,
    QueueFullError,
)
from broker.jobs import JobError, NewJob, Status
from broker.memory import MemoryQueue
from config.settings import Queue
from tests.apiserver import Api, chat

#: Every code that the documentation promises.
DOCUMENTED = {
    "queue_full", "rate_limit_exceeded", "tokens_exceeded", "concurrency_exceeded",
    "budget_exceeded", "deadline_exceeded", "execution_timeout", "cancelled", "worker_lost",
    "max_attempts", "out_of_memory", "context_length_exceeded", "model_not_found",
    "payload_too_large", "result_expired", "idempotency_key_reused", "unsupported_parameter",
    "invalid_request",
}  # fmt: skip


def _body(response: web.Response) -> Any:
    assert isinstance(response.body, bytes)
    return orjson.loads(response.body)


def test_the_table_has_every_documented_code() -> None:
    assert CODES.keys() >= DOCUMENTED
    assert CODES["result_expired"].status == 410
    assert CODES["idempotency_key_reused"].status == 422


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_renders_in_both_shapes(code: str) -> None:
    row = CODES[code]
    error = ApiError(code, param="p", job_id="job_1")
    plain = render(error, make_mocked_request("GET", "/"), "req_1")
    assert plain.status == row.status
    assert _body(plain) == {
        "error": {
            "message": row.title,
            "type": row.type,
            "param": "p",
            "code": code,
            "request_id": "req_1",
            "job_id": "job_1",
        }
    }
    asked = make_mocked_request("GET", "/", headers={"Accept": "application/problem+json"})
    problem = render(error, asked, "req_1")
    assert problem.content_type == "application/problem+json"
    assert _body(problem) == {
        "type": f"urn:forebay:error:{code}",
        "title": row.title,
        "status": row.status,
        "detail": row.title,
        "param": "p",
        "code": code,
        "request_id": "req_1",
        "job_id": "job_1",
    }
    for response in (plain, problem):
        limited = row.status in (429, 503)
        assert ("Retry-After" in response.headers) == limited
        assert ("retry-after-ms" in response.headers) == limited
        assert ("WWW-Authenticate" in response.headers) == (row.status == 401)


def test_what_must_not_be_repeated_says_so() -> None:
    def header(code: str) -> str | None:
        response = render(ApiError(code), make_mocked_request("GET", "/"), "req_1")
        return response.headers.get("x-should-retry")

    assert header("max_attempts") == header("cancelled") == header("budget_exceeded") == "false"
    assert header("worker_lost") is header("queue_full") is header("internal_error") is None


def test_the_wait_of_a_caller_is_at_least_a_second() -> None:
    request = make_mocked_request("GET", "/")
    response = render(ApiError("queue_full", retry_after_s=0.25), request, "r")
    assert response.headers["Retry-After"] == "1"
    assert response.headers["retry-after-ms"] == "250"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFullError("tenant", 5, 1_000), "queue_full"),
        (BrokerUnavailableError("redis://secret"), "broker_unavailable"),
        (JobNotFoundError("job_x"), "job_not_found"),
        (DuplicateJobError("job_x"), "internal_error"),
        (BrokerError("boom"), "internal_error"),
    ],
)
def test_errors_of_the_broker_are_mapped(error: BrokerError, code: str) -> None:
    mapped = from_broker(error)
    assert mapped.code == code
    assert "secret" not in mapped.message
    assert "job_x" not in mapped.message


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (Status.CANCELLED, None, "cancelled"),
        (Status.EXPIRED, None, "deadline_exceeded"),
        (Status.FAILED, None, "internal_error"),
        (Status.FAILED, JobError(code="nobody_knows", message="inner"), "internal_error"),
        (Status.FAILED, JobError(code="out_of_memory", message="m"), "out_of_memory"),
    ],
)
def test_a_job_without_output_is_an_error(
    status: Status, error: JobError | None, code: str
) -> None:
    queue = MemoryQueue(Queue())
    queue.enqueue(NewJob(id="job_1", tenant="t", model="m", endpoint="/", body=b"{}"))
    mapped = from_job(replace(queue.get("job_1"), status=status, error=error))
    assert (mapped.code, mapped.job_id) == (code, "job_1")
    assert mapped.message != "inner"


async def test_aiohttps_own_refusals_have_the_shape_too(api: Api) -> None:
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("PROPFIND", "/v1/jobs", 405, "method_not_allowed"),
    ):
        response = await api.client.request(method, path)
        assert response.status == status
        body = await response.json()
        assert body["error"]["code"] == code
        assert response.headers["x-request-id"] == body["error"]["request_id"]
        assert response.headers["Server"] == "forebay"
    assert set((await api.client.put("/v1/jobs")).headers["Allow"].split(",")) == {"GET", "POST"}


async def test_a_crash_tells_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(api.app[keys.QUEUE], "get", crash, raising=False)
    response = await api.client.get("/v1/jobs/job_00000000000000000000000000")
    assert response.status == 500
    text = await response.text()
    assert "secret" not in text
    assert "internal_error" in text
    assert "Traceback" not in text


async def test_a_problem_document_is_sent_to_whoever_accepts_it(api: Api) -> None:
    response = await api.client.post(
        "/v1/chat/completions",
        json=chat(frob=1),
        headers={"Accept": "application/problem+json, application/json;q=0.5"},
    )
    assert response.content_type == "application/problem+json"
    problem = await response.json(content_type=None)
    assert (problem["status"], problem["code"], problem["param"]) == (
        400,
        "unsupported_parameter",
        "frob",
    )
