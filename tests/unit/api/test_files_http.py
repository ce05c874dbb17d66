"""Uploads, ranges and batches as they look on the wire, and what happens when storage fails."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from api import keys
from api.accounts.errors import DatabaseUnavailableError
from api.batches import claimed as claimed_module
from api.batches import results as results_module
from api.batches import running as running_module
from api.batches.claimed import ClaimedBatch
from api.files import store as store_module
from broker.jobs import Status
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, Api, eventually, make_database, serving
from tests.conftest import PATIENCE_S

FORM = {"Content-Type": "multipart/form-data; boundary=B"}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    settings = load(
        _env_file=None,
        data_dir=tmp_path,
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        api={"read_timeout_s": 1},
        files={"max_bytes": 1000},
        batches={"lease_s": 1, "poll_s": 0.05, "window": 4},
    )
    make_database(settings)
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    async with serving(settings, memory, AsyncMemoryQueue(memory), hub, storage=True) as running:
        yield running
    await hub.stop()


def _form(*parts: tuple[str, bytes], end: bytes = b"--B--\r\n") -> bytes:
    return b"".join(
        b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        % (name.encode(), b'; filename="f.jsonl"' if name == "file" else b"", data)
        for name, data in parts
    ) + end  # fmt: skip


async def _post(api: Api, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    async with api.client.post("/v1/files", data=data, headers={**FORM, **headers}) as response:
        return response.status, await response.json()


def _left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "files").rglob("*") if path.is_file()]


async def _batch(api: Api, *texts: str) -> str:
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions",
         "body": {"model": CHAT, "prompt": text}}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    data = b"\n".join(orjson.dumps(line) for line in lines)
    _, file = await _post(api, _form(("purpose", b"batch"), ("file", data)))
    wanted = {
        "input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h",
    }  # fmt: skip
    async with api.client.post("/v1/batches", json=wanted) as response:
        assert response.status == 200
        return str((await response.json())["id"])


async def _get(api: Api, batch_id: str) -> dict[str, Any]:
    async with api.client.get(f"/v1/batches/{batch_id}") as response:
        found: dict[str, Any] = await response.json()
        return found


async def _ended(api: Api, batch_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while (batch := await _get(api, batch_id))["status"] != status:
            await asyncio.sleep(0.01)
    return batch


# -- uploads --------------------------------------------------------------------------------------
async def test_the_file_may_come_before_its_purpose(api: Api) -> None:
    status, file = await _post(api, _form(("file", b"\r\n--x\r\n"), ("purpose", b"user_data")))
    assert (status, file["filename"], file["bytes"]) == (200, "f.jsonl", 7)
    async with api.client.get(f"/v1/files/{file['id']}/content") as response:
        assert await response.read() == b"\r\n--x\r\n"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Disposition"].startswith("attachment;")
        assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("data", "headers", "status", "code", "param"),
    [
        (_form(("purpose", b"batch")), {}, 400, "invalid_request", "file"),
        (_form(("file", b"x")), {}, 400, "invalid_request", "purpose"),
        (_form(("purpose", b"\xff"), ("file", b"x")), {}, 400, "invalid_request", "purpose"),
        (_form(("purpose", b"x" * 2000)), {}, 400, "invalid_request", "purpose"),
        (_form(("file", b"x"), ("file", b"x")), {}, 400, "invalid_request", "file"),
        (_form(("other", b"x")), {}, 400, "unsupported_parameter", None),
        (
            _form(("purpose", b"batch"), ("expires_after[seconds]", b"3600"), ("file", b"x")),
            {}, 400, "invalid_request", "expires_after",
        ),
        (
            _form(("purpose", b"batch"), ("expires_after[anchor]", b"created_at"),
                  ("expires_after[seconds]", b"5"), ("file", b"x")),
            {}, 400, "invalid_request", "expires_after[seconds]",
        ),
        (_form(("file", b"x"), end=b""), {}, 400, "invalid_request", None),
        (b"--B\r\n[no header]\r\n\r\nx\r\n--B--\r\n", {}, 400, "invalid_request", None),
        (b"--B\r\nX: " + b"x" * 9000 + b"\r\n\r\n--B--\r\n", {}, 400, "invalid_request", None),
        (b"--B\r\n" + b"X: y\r\n" * 200 + b"\r\n--B--\r\n", {}, 400, "invalid_request", None),
        (b"nothing like a form", {}, 400, "invalid_request", None),
        (_form(("file", b"x" * 1001)), {}, 413, "payload_too_large", "file"),
        (b"{}", {"Content-Type": "application/json"}, 415, "unsupported_media_type", None),
        (b"{}", {"Content-Type": "multipart/form-data"}, 400, "invalid_request", None),
        (b"x", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type", None),
    ],
)  # fmt: skip
async def test_forms_that_are_refused(
    api: Api, tmp_path: Path, data: bytes, headers: dict[str, str], status: int, code: str,
    param: str | None,
) -> None:  # fmt: skip
    found, body = await _post(api, data, **headers)
    error = body["error"]
    assert (found, error["code"], error["param"]) == (status, code, param)
    await eventually(lambda: not _left(tmp_path))


async def test_a_body_of_unknown_length_is_cut_off_at_the_limit(api: Api, tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield _form(("file", b""), end=b"")[:-2]
        for _ in range(50):
            yield b"x" * 100

    status, body = await _post(api, endless())
    assert (status, body["error"]["code"]) == (413, "payload_too_large")
    await eventually(lambda: not _left(tmp_path))


async def test_an_upload_that_stops_coming_is_given_up(api: Api, tmp_path: Path) -> None:
    hanging = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield _form(("file", b"abc"), end=b"")[:-2]
        await hanging.wait()

    status, body = await _post(api, slow())
    hanging.set()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    await eventually(lambda: not _left(tmp_path))


async def test_a_sender_that_leaves_leaves_nothing(api: Api, tmp_path: Path) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield _form(("file", b"abc"), end=b"")[:-2]
        await eventually(lambda: _left(tmp_path))
        raise OSError("gone")

    with pytest.raises(aiohttp.ClientError):
        await _post(api, breaks())
    await eventually(lambda: not _left(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "status", "data", "shown"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=5-99", 206, b"56789", "bytes 5-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("lines=1-2", 416, None, "bytes */10"),
    ],
)
async def test_ranges(api: Api, wanted: str, status: int, data: bytes | None, shown: str) -> None:
    _, file = await _post(api, _form(("purpose", b"batch"), ("file", b"0123456789")))
    url = f"/v1/files/{file['id']}/content"
    async with api.client.get(url, headers={"Range": wanted}) as response:
        assert (response.status, response.headers["Content-Range"]) == (status, shown)
        if data is not None:
            assert await response.read() == data


async def test_a_full_disk_is_told_and_nothing_kept(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.os, "fsync", full)
    status, body = await _post(api, _form(("purpose", b"batch"), ("file", b"x")))
    assert (status, body["error"]["code"]) == (507, "storage_full")
    assert not _left(tmp_path)


async def test_a_database_that_is_away_is_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailableError("away")

    monkeypatch.setattr(api.app[keys.LIBRARY].records, "usage", away)
    async with api.client.post("/v1/files", data=_form(("file", b"x")), headers=FORM) as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert (await response.json())["error"]["code"] == "storage_unavailable"


# -- batches --------------------------------------------------------------------------------------
async def test_a_batch_expires_with_what_is_done(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = await _batch(api, "hi", "hold", "hi", "hold")
    await eventually(lambda: len(api.worker.held) == 2)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(claimed_module, "datetime", Tomorrow)
    async with asyncio.timeout(PATIENCE_S):
        while (batch := await _get(api, batch_id))["status"] != "expired":
            api.worker.ring()
            await asyncio.sleep(0.01)
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    async with api.client.get(f"/v1/files/{batch['error_file_id']}/content") as response:
        rows = [orjson.loads(line) for line in (await response.read()).splitlines()]
    assert [row["error"]["code"] for row in rows] == ["batch_expired"] * 2


async def test_a_batch_waits_while_the_queue_has_no_room(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "_LONGEST_PAUSE_S", 0.05)
    api.queue.drain(CHAT)
    batch_id = await _batch(api, "hi", "hi")
    await _ended(api, batch_id, "in_progress")
    api.queue.resume(CHAT)
    assert (await _ended(api, batch_id, "completed"))["request_counts"]["completed"] == 2


async def test_a_cancel_before_the_lines_were_checked_leaves_no_files(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = asyncio.Event(), asyncio.Event()
    lines = ClaimedBatch.lines

    async def held(self: ClaimedBatch) -> AsyncIterator[Any]:
        checking.set()
        await go_on.wait()
        async for line in lines(self):
            yield line

    monkeypatch.setattr(ClaimedBatch, "lines", held)
    batch_id = await _batch(api, "hi", "hi")
    await checking.wait()
    async with api.client.post(f"/v1/batches/{batch_id}/cancel") as response:
        assert (await response.json())["status"] == "cancelling"
    go_on.set()
    batch = await _ended(api, batch_id, "cancelled")
    assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert api.queue.list_jobs("ten_a")[0] == []


async def test_a_disk_that_is_full_for_a_while_costs_a_batch_only_time(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.batches import runner as runner_module

    failures = []

    def full(_: int) -> None:
        failures.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runner_module, "_AGAIN_S", 0.05)
    with monkeypatch.context() as failing:
        batch_id = await _batch(api, "hold", "hi", "hi")
        await eventually(lambda: api.worker.held)
        failing.setattr(results_module.os, "fsync", full)
        api.worker.release()
        await eventually(lambda: len(failures) >= 3)
    batch = await _ended(api, batch_id, "completed")
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    jobs, _ = api.queue.list_jobs("ten_a")
    assert [(job.status, job.attempt) for job in jobs] == [(Status.COMPLETED, 1)] * 3


async def test_what_crashes_left_behind_is_tidied_up(api: Api, tmp_path: Path) -> None:
    _, kept = await _post(api, _form(("purpose", b"batch"), ("file", b"x")))
    objects, drafts = tmp_path / "files" / "objects", tmp_path / "files" / "drafts"
    batches = tmp_path / "files" / "batches"
    (batches / "batch_gone").mkdir(parents=True)
    (objects / "file-unknown").write_bytes(b"x")
    (objects / "file-young").write_bytes(b"x")
    (drafts / "half").write_bytes(b"x")
    long_ago = (datetime.now(UTC) - timedelta(days=1)).timestamp()
    for path in (
        objects / "file-unknown", objects / kept["id"], drafts / "half", batches / "batch_gone",
    ):  # fmt: skip
        os.utime(path, (long_ago, long_ago))
    assert await asyncio.to_thread(api.app[keys.BATCHES].tidy) == (0, 2)
    assert sorted(path.name for path in objects.iterdir()) == sorted(["file-young", kept["id"]])
    assert not list(drafts.iterdir())
    assert not list(batches.iterdir())
