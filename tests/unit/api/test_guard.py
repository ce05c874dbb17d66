"""What every request goes through: ids, credentials, scopes, bounds of the body, the log."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from aiohttp import web
from structlog.testing import capture_logs

from api import keys
from api.auth.errors import AuthenticationUnavailableError
from api.files.ids import new_batch_id, new_file_id
from api.middlewares import guard
from api.routes import PUBLIC, ROUTES, Route
from broker.errors import BrokerUnavailableError
from broker.jobs import new_job_id
from tests.apiserver import CHAT, Api, chat, job
from tests.conftest import PATIENCE_S


def _path(route: Route) -> str:
    return route.path.format(
        job_id=new_job_id(),
        model=CHAT,
        response_id="resp_x",
        conversation_id="conv_x",
        item_id="msg_x",
        asset="main.js" if route.path.startswith("/console") else "start.js",
        file_id=new_file_id(),
        batch_id=new_batch_id(),
        endpoint_id="wep_" + "0" * 20,
        delivery_id="whd_" + "0" * 26,
    )


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Log events of the guard; loggers made before are cached with their own processors."""
    with capture_logs() as captured:
        monkeypatch.setattr(guard, "log", structlog.get_logger())
        yield captured


@pytest.mark.parametrize("scope", ["", "root", "job"])
def test_a_route_without_a_known_scope_does_not_start(scope: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    with pytest.raises(ValueError, match="/v1/x"):
        Route("GET", "/v1/x", handler, scope)


def test_only_probes_reference_and_console_are_public() -> None:
    assert {route.path for route in ROUTES if route.scope == PUBLIC} == {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/docs/{asset}",
        "/console",
        "/console/{asset}",
    }


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_wants_its_scope(api: Api, route: Route) -> None:
    async def status(authorization: str) -> int:
        headers = {"Authorization": authorization}
        response = await api.client.request(route.method, _path(route), headers=headers)
        if response.status in (401, 403):
            error = (await response.json())["error"]
            assert error["code"] in ("invalid_api_key", "insufficient_scope")
            assert ("WWW-Authenticate" in response.headers) == (response.status == 401)
        return response.status

    if route.scope == PUBLIC:
        assert await status("") in (200, 503)
        return
    holder, other = ("a", "admin") if route.scope == "jobs" else ("admin", "a")
    assert await status("") == 401
    assert await status("Bearer nobody") == 401
    assert await status(f"Bearer {other}") == 403
    assert await status(f"Bearer {holder}") not in (401, 403)


async def test_accounts_that_are_not_loaded_are_503(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str | None) -> None:
        raise AuthenticationUnavailableError

    monkeypatch.setattr(api.app[keys.AUTHENTICATOR], "authenticate", refuse)
    response = await api.client.get("/v1/models")
    assert response.status == 503
    assert "Retry-After" in response.headers


@pytest.mark.parametrize("given", ["abc-1", "A.b_c:9", "x" * 128])
async def test_a_sane_request_id_is_kept(api: Api, given: str) -> None:
    response = await api.client.post("/v1/jobs", json=job(), headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert api.queue.get((await response.json())["id"]).request_id == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "ü", "<script>"])
async def test_an_odd_request_id_is_replaced(api: Api, given: str) -> None:
    response = await api.client.get("/healthz", headers={"x-request-id": given})
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_body_over_the_limit_is_413_before_it_is_read(api: Api) -> None:
    limit = api.app[keys.SETTINGS].api.max_body_bytes
    host, port = api.client.host, api.client.port
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\n"
        f"Content-Length: {limit + 1}\r\n\r\n"
    )
    writer.write(head.encode() + b"only the beginning")
    assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_chunked_body_over_the_limit_is_413(api: Api) -> None:
    async def endless() -> Any:
        for _ in range(200):
            yield b"x" * 1024

    response = await api.client.post("/v1/chat/completions", data=endless())
    assert response.status == 413
    assert (await response.json())["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize(
    "beginning", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]
)
async def test_a_body_that_does_not_come_is_not_waited_for(api: Api, beginning: bytes) -> None:
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\n" + beginning)
    async with asyncio.timeout(PATIENCE_S):
        assert b" 408 " in await reader.readline()
        answer = await reader.readuntil(b'"code":"request_timeout"')
    assert b"x-request-id: req_" in answer
    writer.close()
    await writer.wait_closed()


async def test_a_body_at_the_limit_is_read(api: Api) -> None:
    limit = api.app[keys.SETTINGS].api.max_body_bytes
    payload = json.dumps(chat()).encode()
    response = await api.client.post(
        "/v1/chat/completions", data=payload + b" " * (limit - len(payload))
    )
    assert response.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_compressed_bodies_are_refused_unread(api: Api, encoding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    response = await api.client.post(
        "/v1/chat/completions", data=bomb, headers={"Content-Encoding": encoding}
    )
    assert response.status == 415
    assert (await response.json())["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("text/plain", 200),
        ("application/octet-stream", 200),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_content_types(api: Api, content_type: str, status: int) -> None:
    response = await api.client.post(
        "/v1/chat/completions",
        data=json.dumps(chat()).encode(),
        headers={"Content-Type": content_type},
    )
    assert response.status == status


@pytest.mark.parametrize(("size", "answer"), [(2, b"100"), (10**9, b"413")])
async def test_expect_continue_asks_only_for_what_will_be_read(
    api: Api, size: int, answer: bytes
) -> None:
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size
    )
    assert (await reader.readline()).split(b" ")[1] == answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "no-such"}, 404, "model_not_found", "model"),
        ({"model": "all-minilm-l6-v2"}, 400, "invalid_request", "model"),
        ({"max_tokens": 10**9}, 400, "invalid_request", "max_tokens"),
        ({"max_tokens": 1025}, 400, "invalid_request", "max_tokens"),
        ({"max_completion_tokens": 1025}, 400, "invalid_request", "max_completion_tokens"),
        ({"x" * 500: 1}, 400, "unsupported_parameter", "x" * 128),
        ({"a\r\nb": 1}, 400, "unsupported_parameter", "a\\r\\nb"),
    ],
)
@pytest.mark.parametrize("native", [False, True])
async def test_a_bad_request_never_becomes_a_job(
    api: Api, native: bool, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    payload = job(body=changes) if native else chat(**changes)
    response = await api.client.post("/v1/jobs" if native else "/v1/chat/completions", json=payload)
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (status, code)
    assert error["param"] == (f"body.{param}" if native else param)[:128]
    assert api.queue.list_jobs("ten_a") == ([], False)


async def test_an_embedding_model_serves_no_chat_job_either(api: Api) -> None:
    payload = {"endpoint": "/v1/embeddings", "body": {"model": CHAT, "input": "x"}}
    response = await api.client.post("/v1/jobs", json=payload)
    assert (await response.json())["error"]["param"] == "body.model"


async def test_priorities_of_job_and_body_must_agree(api: Api) -> None:
    response = await api.client.post(
        "/v1/jobs", json=job(priority="batch", body={"service_tier": "default"})
    )
    assert (await response.json())["error"]["param"] == "priority"


async def test_an_absent_queue_is_503_with_a_time_to_retry(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise BrokerUnavailableError("redis://:password@host")

    for name in ("enqueue", "get", "list_jobs"):
        monkeypatch.setattr(api.app[keys.QUEUE], name, away, raising=False)
    for method, path, payload in (
        ("POST", "/v1/jobs", job()),
        ("POST", "/v1/chat/completions", chat()),
        ("POST", "/v1/chat/completions", chat(stream=True)),
        ("GET", "/v1/jobs", None),
        ("GET", f"/v1/jobs/{new_job_id()}", None),
        ("GET", f"/v1/jobs/{new_job_id()}/events", None),
    ):
        response = await api.client.request(method, path, json=payload)
        assert response.status == 503
        error = (await response.json())["error"]
        assert (error["code"], error["type"]) == ("broker_unavailable", "server_error")
        assert "password" not in error["message"]
        assert int(response.headers["Retry-After"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1


async def test_logs_tell_what_was_refused_but_no_content(api: Api, logs: Any) -> None:
    canary = "canary-5b1d"
    await api.client.post("/v1/chat/completions", json=chat(canary, frob=canary))
    await api.client.post("/v1/jobs", data=canary, headers={"Authorization": f"Bearer {canary}"})
    await api.client.get(f"/{canary}?{canary}")
    assert [entry["event"] for entry in logs] == [
        "request_refused",
        "authentication_failed",
        "request_refused",
        "request_refused",
    ]
    assert logs[0]["route"] == "/v1/chat/completions"
    assert logs[3]["route"] == "other"
    assert canary not in repr(logs)


async def test_a_probe_that_finds_nothing_ready_is_no_news(api: Api, logs: Any) -> None:
    assert (await api.client.get("/readyz")).status == 503
    assert [entry for entry in logs if entry["log_level"] != "debug"] == []


@pytest.mark.parametrize(
    "head",
    [
        b"BREW /canary HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer canary\x00\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: canary" + b"x" * 10_000 + b"\r\n",
        b"canary\r\n",
    ],
)
async def test_what_is_no_http_is_400_and_quoted_nowhere(
    api: Api, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    caplog.set_level("DEBUG")
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(head + b"Host: x\r\n\r\n")
    answer, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert b"aiohttp" not in answer
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("invalid_request", "invalid_request_error")
    assert f"x-request-id: {error['request_id']}".encode() in answer
    assert b"canary" not in body
    writer.close()
    await writer.wait_closed()
    assert "request_not_understood" in caplog.text
    assert "canary" not in caplog.text


async def test_a_crash_is_logged_with_its_request_id(
    api: Api, logs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(api.app[keys.QUEUE], "list_jobs", crash, raising=False)
    response = await api.client.get("/v1/jobs")
    assert response.status == 500
    (entry,) = [entry for entry in logs if entry["event"] == "request_crashed"]
    assert entry["request_id"] == response.headers["x-request-id"]
    assert isinstance(entry["exc_info"], RuntimeError)


async def test_a_body_in_tiny_chunks_is_refused(api: Api) -> None:
    async def dribble(size: int, count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * size

    tiny = await api.client.post("/v1/jobs", data=dribble(1, 2_000))
    assert tiny.status == 400
    assert "chunks" in (await tiny.json())["error"]["message"]
    fair = await api.client.post("/v1/jobs", data=dribble(100, 500))
    assert "not valid JSON" in (await fair.json())["error"]["message"]
    large = await api.client.post("/v1/jobs", data=dribble(1_000, 100))
    assert large.status == 413
