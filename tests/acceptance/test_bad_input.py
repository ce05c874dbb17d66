"""Bad input: a clear 4xx that names the field, never a job, never a 500, never in a log."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import httpx2
import pytest

from tests.conftest import PATIENCE_S

CHAT = "smollm2-135m"
GOOD: dict[str, Any] = {"model": CHAT, "messages": [{"role": "user", "content": "hi"}]}


async def _post(
    stack: Any, path: str, data: bytes | str, **headers: str
) -> tuple[int, dict[str, Any]]:
    sent = {"Authorization": f"Bearer {stack.admin_key}", "Content-Type": "application/json"}
    # httpx2 aborts a connection whose body was refused half-way; aiohttp's client leaves the rest
    # of the 11 MB in a transport that outlives the test's loop.
    async with httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        response = await client.post(stack.api + path, content=data, headers=sent | headers)
    body = response.json()
    assert response.headers["x-request-id"] == body["error"]["request_id"]
    return response.status_code, body["error"]


def _with(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer nonsense", "Basic YTpi"])
async def test_no_or_wrong_key(stack: Any, authorization: str) -> None:
    status, error = await _post(stack, "/v1/chat/completions", _with(), Authorization=authorization)
    assert status == 401
    assert error["type"] == "authentication_error"


async def test_a_key_with_one_letter_changed(stack: Any) -> None:
    key = stack.admin_key[:-1] + ("a" if stack.admin_key[-1] != "a" else "b")
    status, _ = await _post(stack, "/v1/jobs", "{}", Authorization=f"Bearer {key}")
    assert status == 401


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ("{", 400, "invalid_request", None),
        ("[]", 400, "invalid_request", None),
        ("", 400, "invalid_request", None),
        (b"\xff\xfe{}", 400, "invalid_request", None),
        (_with(model="no-such"), 404, "model_not_found", "model"),
        (_with(model=7), 400, "invalid_request", "model"),
        (_with(messages=[]), 400, "invalid_request", "messages"),
        (_with(messages="hi"), 400, "invalid_request", "messages"),
        (_with(messages=[{"role": "user"}]), 400, "invalid_request", "messages.0.content"),
        (_with(messages=[{"role": "king", "content": "x"}]), 400, "invalid_request", None),
        (_with(max_tokens=0), 400, "invalid_request", "max_tokens"),
        (_with(max_tokens=10**9), 400, "invalid_request", "max_tokens"),
        (_with(max_tokens="7"), 400, "invalid_request", "max_tokens"),
        (_with(temperature=-1), 400, "invalid_request", "temperature"),
        (_with(temperature=float("nan")), 400, None, None),
        (_with(stop=["a"] * 9), 400, "invalid_request", "stop"),
        (_with(frobnicate=True), 400, "unsupported_parameter", "frobnicate"),
        (_with(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
        (_with(n=3), 400, "unsupported_parameter", "n"),
        (_with(n=17), 400, "invalid_request", "n"),
        (
            _with(response_format={"type": "json_object"}),
            400,
            "unsupported_parameter",
            "response_format",
        ),
        (_with(structured_outputs={"regex": "("}), 400, None, "structured_outputs.regex"),
        (_with(logprobs=True), 403, "parameter_not_allowed", "logprobs"),
        (_with(model="all-minilm-l6-v2"), 400, None, "model"),
    ],
)
async def test_a_bad_chat(
    stack: Any, body: str | bytes, status: int, code: str | None, param: str | None
) -> None:
    got, error = await _post(stack, "/v1/chat/completions", body)
    assert got == status
    assert code in (None, error["code"])
    if param is not None:
        assert error["param"] == param


async def test_a_body_of_11_mb(stack: Any) -> None:
    content = "x" * (11 * 1024 * 1024)
    status, error = await _post(
        stack, "/v1/chat/completions", _with(messages=[{"role": "user", "content": content}])
    )
    assert (status, error["code"]) == (413, "payload_too_large")


async def test_a_prompt_longer_than_the_context(stack: Any) -> None:
    status, error = await _post(
        stack, "/v1/chat/completions", _with(messages=[{"role": "user", "content": "word " * 9000}])
    )
    assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_odd_characters_are_text(stack: Any) -> None:
    content = "\u0000\u0007\u200f𝔘𝔫𝔦 \U0001f9ea <|im_end|>\n\tend"
    headers = {"Authorization": f"Bearer {stack.admin_key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            stack.api + "/v1/chat/completions",
            json=GOOD | {"messages": [{"role": "user", "content": content}], "max_tokens": 4},
            headers=headers,
        ) as response,
    ):
        assert response.status in (200, 400)
        body = await response.json()
        assert "choices" in body or body["error"]["code"] == "invalid_request"


async def test_none_of_it_became_a_job_or_a_log_line(stack: Any) -> None:
    secret = "canary-5b1d"
    await _post(stack, "/v1/chat/completions", _with(frobnicate=secret))
    await _post(
        stack, "/v1/chat/completions", _with(messages=[{"role": secret, "content": secret}])
    )
    await _post(stack, "/v1/chat/completions", f'{{"model": "{secret}')
    log = (stack.data_dir.parent / f"{stack.data_dir.name}.log").read_text()
    assert secret not in log


async def test_a_client_that_leaves_cancels_its_stream(stack: Any) -> None:
    headers = {"Authorization": f"Bearer {stack.admin_key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        response = await session.post(
            stack.api + "/v1/chat/completions", json=GOOD | {"stream": True, "max_tokens": 1000}
        )
        await response.content.readline()
        response.close()
        url = f"{stack.api}/v1/jobs?limit=1"
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with session.get(url) as listing:
                    (job,) = (await listing.json())["data"]
                if job["status"] == "cancelled":
                    break
                await asyncio.sleep(0.05)
        assert job["usage"]["output_tokens"] < 1000
