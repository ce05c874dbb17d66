"""Files and batches by the unmodified `openai` package, on the in-memory queue and on Valkey."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from redis import Redis

from broker import keys
from broker.async_queue import AsyncRedisQueue
from broker.connections import connect, connect_async
from broker.jobs import Band, Status
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.policies import TenantPolicy
from broker.redis_queue import RedisQueue
from broker.results import EventHub, MemoryHub
from broker.webhooks.outbox import OutboxEvent
from config.settings import Settings, load
from tests.apiserver import CHAT, EMBED, Api, eventually, make_database, serving
from tests.conftest import PATIENCE_S

_ENDED = {"completed", "failed", "expired", "cancelled"}


def _settings(tmp_path: Path, **more: Any) -> Settings:
    settings = load(
        _env_file=None,
        data_dir=tmp_path,
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        files={"max_bytes": 300_000, "quota_bytes": 400_000},
        batches={"lease_s": 1, "poll_s": 0.1, "window": 16, "max_lines": 200, "max_unfinished": 3},
        **more,
    )
    make_database(settings)
    return settings


@pytest.fixture(params=["memory", "valkey"])
async def api(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Api]:
    if request.param == "memory":
        settings = _settings(tmp_path)
        memory = MemoryQueue(settings.queue)
        hub = MemoryHub(memory)
        await hub.start()
        queue = AsyncMemoryQueue(memory)
        async with serving(settings, memory, queue, hub, storage=True) as running:
            yield running
        await hub.stop()
        return
    settings = _settings(tmp_path, redis={"url": request.getfixturevalue("valkey")})
    client = connect(settings.redis)
    async with connect_async(settings.redis) as async_client:
        events = EventHub(async_client)
        await events.start()
        redis_queue = RedisQueue(client, settings.queue)
        async_queue = AsyncRedisQueue(async_client, settings.queue)
        async with serving(settings, redis_queue, async_queue, events, storage=True) as running:
            yield running
        await events.stop()
    client.close()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with _client(api, "a") as client:
        yield client


def _client(api: Api, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=api.url + "v1", api_key=key, max_retries=0, timeout=PATIENCE_S
    )


def _line(number: int, text: str = "hi", **changes: Any) -> dict[str, Any]:
    body = {"model": CHAT, "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions"}
    return {**line, "body": {**body, **changes}}


async def _upload(client: openai.AsyncOpenAI, lines: list[Any]) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file = await client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    return file.id


async def _batch(client: openai.AsyncOpenAI, lines: list[Any], **changes: Any) -> Any:
    wanted: dict[str, Any] = {
        "input_file_id": await _upload(client, lines),
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return await client.batches.create(**{**wanted, **changes})


async def _ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while (batch := await client.batches.retrieve(batch_id)).status not in _ENDED:
            await asyncio.sleep(0.02)
    return batch


async def _results(client: openai.AsyncOpenAI, file_id: str) -> dict[str, Any]:
    content = await client.files.content(file_id)
    rows = [json.loads(line) for line in content.text.splitlines()]
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


# -- files ----------------------------------------------------------------------------------------
async def test_a_file_comes_back_as_it_was(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    file = await client.files.create(
        file=("../../etc/pass\u202ewd.bin", io.BytesIO(data)),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.bytes, file.purpose, file.filename) == (len(data), "user_data", "passwd.bin")
    assert file.expires_at == file.created_at + 3600
    assert (await client.files.retrieve(file.id)) == file
    assert (await client.files.content(file.id)).content == data
    assert [one.id async for one in client.files.list()] == [file.id]
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        await client.files.content(file.id)
    assert gone.value.code == "file_not_found"
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


async def test_lists_of_files_are_walked(client: openai.AsyncOpenAI) -> None:
    made = []
    for number in range(5):
        purpose: Any = "batch" if number % 2 else "user_data"
        file = await client.files.create(file=(f"{number}", b"x"), purpose=purpose)
        made.append(file.id)
    assert [file.id async for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id async for file in client.files.list(limit=2, order="asc")] == made
    assert [file.id async for file in client.files.list(purpose="batch")] == [made[3], made[1]]
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.files.list(after="file-nothing")
    assert unknown.value.param == "after"


async def test_uploads_that_are_refused_leave_nothing(
    client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        await client.files.create(file=("x", b"x" * 300_001), purpose="batch")
    assert (large.value.status_code, large.value.code) == (413, "payload_too_large")
    with pytest.raises(openai.BadRequestError) as purpose:
        await client.files.create(file=("x", b"x"), purpose="batch_output")  # type: ignore[arg-type]
    assert purpose.value.param == "purpose"
    first = await client.files.create(file=("x", b"x" * 299_000), purpose="batch")
    with pytest.raises(openai.RateLimitError) as quota:
        await client.files.create(file=("x", b"x" * 200_000), purpose="batch")
    assert quota.value.code == "storage_quota_exceeded"
    kept = [path.name for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert kept == [first.id]


async def test_files_and_batches_of_others_are_not_there(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    batch = await _batch(client, [_line(1)])
    async with _client(api, "b") as other:
        for call in (
            other.files.retrieve(batch.input_file_id),
            other.files.content(batch.input_file_id),
            other.files.delete(batch.input_file_id),
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            other.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert [file async for file in other.files.list()] == []
        assert [one async for one in other.batches.list()] == []
        with pytest.raises(openai.BadRequestError):
            await other.batches.list(after=batch.id)
    await _ended(client, batch.id)


# -- batches --------------------------------------------------------------------------------------
async def test_a_batch_is_done(api: Api, client: openai.AsyncOpenAI) -> None:
    lines: list[Any] = [_line(number) for number in range(40)]
    lines += ["", _line(40, "fail context_length_exceeded"), _line(41, "\u00e4\U0001f642"), ""]
    api.accounts.change("a", policy=TenantPolicy(requests_per_minute=1, max_jobs=1))
    batch = await _batch(client, lines, metadata={"night": "1"})
    assert (batch.object, batch.status) == ("batch", "validating")
    assert (batch.model, batch.usage) == (None, None)
    assert batch.metadata == {"night": "1"}
    done = await _ended(client, batch.id)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 42, "completed": 41, "failed": 1}
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.expires_at == done.created_at + 86_400
    assert done.model == CHAT
    output = await _results(client, done.output_file_id)
    assert set(output) == {f"line-{number}" for number in (*range(40), 41)}
    one = output["line-3"]
    assert (one["error"], one["response"]["status_code"]) == (None, 200)
    assert one["response"]["body"]["choices"][0]["message"]["content"] == "one two three"
    errors = await _results(client, done.error_file_id)
    assert errors["line-40"]["response"]["status_code"] == 400
    refused = errors["line-40"]["response"]["body"]["error"]
    assert refused["code"] == "context_length_exceeded"
    # The lines were jobs of the batch band, and no limit was asked.
    jobs, _ = api.queue.list_jobs("ten_a", limit=100)
    used = [job.usage for job in jobs if job.status is Status.COMPLETED]
    assert done.usage.model_dump() == {
        "input_tokens": sum(each.input_tokens for each in used),
        "input_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in used)},
        "output_tokens": sum(each.output_tokens for each in used),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sum(each.total_tokens for each in used),
    }
    assert done.usage.total_tokens
    assert {job.band for job in jobs} == {Band.BATCH}
    assert len(jobs) == 42
    assert json.loads(jobs[0].metadata)["batch_id"] == batch.id
    files = [file.purpose async for file in client.files.list()]
    assert sorted(files) == ["batch", "batch_output", "batch_output"]


async def test_embeddings_and_completions(client: openai.AsyncOpenAI) -> None:
    vectors = {"custom_id": "v", "method": "POST", "url": "/v1/embeddings",
               "body": {"model": EMBED, "input": ["a", "b"]}}  # fmt: skip
    texts = {"custom_id": "t", "method": "POST", "url": "/v1/completions",
             "body": {"model": CHAT, "prompt": "hi"}}  # fmt: skip
    first = await _batch(client, [vectors], endpoint="/v1/embeddings")
    second = await _batch(client, [texts], endpoint="/v1/completions")
    output = await _results(client, (await _ended(client, first.id)).output_file_id)
    assert len(output["v"]["response"]["body"]["data"]) == 2
    output = await _results(client, (await _ended(client, second.id)).output_file_id)
    assert output["t"]["response"]["body"]["choices"][0]["text"] == "one two three"
    assert [one.id async for one in client.batches.list(limit=1)] == [second.id, first.id]


async def test_responses(client: openai.AsyncOpenAI) -> None:
    def line(name: str, **more: Any) -> dict[str, Any]:
        body = {"model": CHAT, "input": "hi", **more}
        return {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": body}

    good = await _batch(client, [line("a", metadata={"k": "v"})], endpoint="/v1/responses")
    output = await _results(client, (await _ended(client, good.id)).output_file_id)
    shown = openai.types.responses.Response.model_validate(output["a"]["response"]["body"])
    assert (shown.status, shown.output_text) == ("completed", "one two three")
    assert shown.metadata == {"k": "v", "batch_id": good.id, "custom_id": "a"}
    assert (await client.responses.retrieve(shown.id)).output_text == "one two three"
    lines = [
        line("a", previous_response_id="resp_x"),
        line("b", conversation="conv_x"),
        line("c", background=True),
        line("d", input=[]),
    ]
    bad = await _ended(client, (await _batch(client, lines, endpoint="/v1/responses")).id)
    assert (bad.status, bad.output_file_id) == ("completed", None)
    errors = await _results(client, bad.error_file_id)
    assert {name: row["response"]["body"]["error"]["param"] for name, row in errors.items()} == {
        "a": "body.previous_response_id",
        "b": "body.conversation",
        "c": "body.background",
        "d": "body.input",
    }


async def test_lines_that_cannot_be_told_apart_fail_the_batch(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    lines = [
        _line(1),
        "{broken",
        _line(1),
        {**_line(4), "method": "GET"},
        {**_line(5), "url": "/v1/embeddings"},
        {key: value for key, value in _line(6).items() if key != "custom_id"},
        {**_line(7), "body": "hi"},
        {**_line(8), "custom_id": ""},
    ]
    done = await _ended(client, (await _batch(client, lines)).id)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert (done.output_file_id, done.error_file_id) == (None, None)
    found = [(error.line, error.code, error.param) for error in done.errors.data]
    assert found == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_request", "method"),
        (5, "invalid_request", "url"),
        (6, "invalid_request", "custom_id"),
        (7, "invalid_request", "body"),
        (8, "invalid_request", "custom_id"),
    ]
    jobs, _ = api.queue.list_jobs("ten_a")
    assert jobs == []


async def test_a_bad_request_is_an_error_of_its_line(api: Api, client: openai.AsyncOpenAI) -> None:
    bad: list[tuple[Any, str, str | None]] = [
        (_line(2, logprobs=True), "unsupported_parameter", "body.logprobs"),
        (_line(3, model="no-such"), "model_not_found", "body.model"),
        (_line(4, stream=True), "unsupported_parameter", "body.stream"),
        (_line(5, priority="interactive"), "unsupported_parameter", "body.priority"),
        (_line(6, max_tokens=10**9), "invalid_request", "body.max_tokens"),
        ({**_line(7), "more": 1}, "unsupported_parameter", "more"),
        (json.dumps(_line(8)).replace('"hi"', "NaN"), "invalid_request", None),
        (_line(9, "\0"), "invalid_request", "body.messages.0.content"),
        ({**_line(10), "custom_id": "line\0-10"}, "invalid_request", "custom_id"),
    ]
    lines = [_line(1), *[line for line, _, _ in bad], _line(11)]
    done = await _ended(client, (await _batch(client, lines)).id)
    assert (done.status, done.errors) == ("completed", None)
    assert done.request_counts.model_dump() == {"total": 11, "completed": 2, "failed": 9}
    assert done.model == CHAT
    assert set(await _results(client, done.output_file_id)) == {"line-1", "line-11"}
    errors = list((await _results(client, done.error_file_id)).values())
    assert {each["response"]["status_code"] for each in errors} == {400, 404}
    found = {
        each["custom_id"]: (error["code"], error["param"])
        for each in errors
        for error in [each["response"]["body"]["error"]]
    }
    assert found.pop("line-8")[0] == "invalid_request"
    assert found.pop("line\0-10") == ("invalid_request", "custom_id")
    assert found == {f"line-{n}": bad[n - 2][1:] for n in (2, 3, 4, 5, 6, 7, 9)}
    jobs, _ = api.queue.list_jobs("ten_a")
    assert len(jobs) == 2


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (json.dumps(_line(1)).encode("utf-16"), "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (b'{"custom_id": "\\ud800", "method": "POST"}', "invalid_json_line"),
        (b"[" * 2000, "invalid_json_line"),
        (b"[]", "invalid_request"),
        (b"\n".join(json.dumps(_line(n)).encode() for n in range(201)), "too_many_lines"),
    ],
)
async def test_inputs_that_are_no_batch(client: openai.AsyncOpenAI, data: bytes, code: str) -> None:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    done = await _ended(client, batch.id)
    assert (done.status, done.errors.data[0].code) == ("failed", code)


async def test_a_byte_order_mark_and_windows_line_ends_are_read(
    client: openai.AsyncOpenAI,
) -> None:
    data = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(_line(n)).encode() for n in range(3))
    file = await client.files.create(file=("in.jsonl", data + b"\r\n"), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert (await _ended(client, batch.id)).request_counts.completed == 3


async def test_what_cannot_be_a_batch_is_refused_at_once(client: openai.AsyncOpenAI) -> None:
    kept = await client.files.create(file=("x", b"x"), purpose="user_data")
    with pytest.raises(openai.NotFoundError) as wrong:
        await client.batches.create(
            input_file_id=kept.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert (wrong.value.code, wrong.value.param) == ("file_not_found", "input_file_id")
    with pytest.raises(openai.BadRequestError) as endpoint:
        await _batch(client, [_line(1)], endpoint="/v1/nothing")
    assert endpoint.value.param == "endpoint"
    with pytest.raises(openai.BadRequestError) as window:
        await _batch(client, [_line(1)], completion_window="1h")
    assert window.value.param == "completion_window"


async def test_webhooks_are_told_of_the_end(api: Api, client: openai.AsyncOpenAI) -> None:
    queue: Any = api.queue
    if isinstance(queue, MemoryQueue):
        queue.webhook_tenants.add("ten_a")
    else:
        redis = Redis(connection_pool=queue._pool)
        redis.hset(keys.webhook_endpoints("ten_a"), "wep_1", "{}")

    def told() -> set[tuple[str, str, str]]:
        if isinstance(queue, MemoryQueue):
            found = queue.outbox
        else:
            raw = redis.lrange(keys.WEBHOOK_OUTBOX, 0, -1)
            found = [OutboxEvent.from_json(each) for each in raw]
        return {(each.type, each.tenant, each.batch) for each in found if each.batch}

    good, bad = await _batch(client, [_line(1)]), await _batch(client, ["{"])
    for batch in (good, bad):
        await _ended(client, batch.id)
    async with _client(api, "b") as other:
        await _ended(other, (await _batch(other, [_line(1)])).id)
    await eventually(lambda: len(told()) == 2)
    assert told() == {
        ("batch.completed", "ten_a", good.id),
        ("batch.failed", "ten_a", bad.id),
    }


async def test_a_cancel_keeps_what_is_done(api: Api, client: openai.AsyncOpenAI) -> None:
    lines = [_line(number, "hold" if 5 <= number < 30 else "hi") for number in range(60)]
    batch = await _batch(client, lines)
    async with asyncio.timeout(PATIENCE_S):
        # The window is full of lines that are held.
        while len(api.worker.held) < 16:
            await asyncio.sleep(0.01)
    with pytest.raises(openai.ConflictError) as used:
        await client.files.delete(batch.input_file_id)
    assert used.value.code == "file_in_use"
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    async with asyncio.timeout(PATIENCE_S):
        while (done := await client.batches.retrieve(batch.id)).status == "cancelling":
            api.worker.ring()
            await asyncio.sleep(0.02)
    assert done.status == "cancelled"
    assert done.request_counts.model_dump() == {"total": 60, "completed": 5, "failed": 55}
    assert set(await _results(client, done.output_file_id)) == {f"line-{n}" for n in range(5)}
    errors = await _results(client, done.error_file_id)
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    jobs, _ = api.queue.list_jobs("ten_a", limit=100)
    assert {job.status for job in jobs} == {Status.COMPLETED, Status.CANCELLED}
    assert (await client.batches.cancel(batch.id)).status == "cancelled"
    await client.files.delete(batch.input_file_id)


async def test_a_batch_that_has_ended_is_not_cancelled(client: openai.AsyncOpenAI) -> None:
    batch = await _batch(client, [_line(1)])
    await _ended(client, batch.id)
    with pytest.raises(openai.ConflictError) as ended:
        await client.batches.cancel(batch.id)
    assert ended.value.code == "batch_ended"


async def test_unfinished_batches_are_bounded(api: Api, client: openai.AsyncOpenAI) -> None:
    batches = [await _batch(client, [_line(1, "hold")]) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as refused:
        await _batch(client, [_line(1)])
    assert refused.value.code == "too_many_batches"
    async with asyncio.timeout(PATIENCE_S):
        while len(api.worker.held) < 3:
            await asyncio.sleep(0.01)
    api.worker.release()
    for batch in batches:
        assert (await _ended(client, batch.id)).status == "completed"


async def test_a_batch_through_the_whole_stack(stack: Any) -> None:
    secret = stack.json("keys", "create", "default")["key"]
    async with openai.AsyncOpenAI(
        base_url=stack.api + "/v1", api_key=secret, max_retries=0, timeout=PATIENCE_S
    ) as client:
        batch = await _batch(client, [_line(n, max_tokens=4) for n in range(20)])
        done = await _ended(client, batch.id)
        assert done.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
        output = await _results(client, done.output_file_id)
        body = output["line-7"]["response"]["body"]
        assert (body["system_fingerprint"], body["usage"]["completion_tokens"]) == ("simulated", 4)
