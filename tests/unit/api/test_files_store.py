"""Bytes on disk, their names, and the results of a batch while they are gathered."""

from __future__ import annotations

import errno
import io
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from api.accounts.batch import Batch
from api.batches.lines import LineReader
from api.batches.results import Results, refused, result_of, undone
from api.errors import ApiError
from api.files import store as store_module
from api.files.ids import line_job_id, new_batch_id, result_file_id
from api.files.store import (
    DiskFileStore,
    FileStoreError,
    ObjectMissingError,
    StorageFullError,
)
from api.handlers.jobs import _JOB_ID
from api.schemas.files import safe_name
from broker.jobs import Band, Job, JobError, Status, Usage

BATCH_ID = new_batch_id()


@pytest.fixture
def store(tmp_path: Path) -> DiskFileStore:
    return DiskFileStore(tmp_path / "files")


def _keep(store: DiskFileStore, file_id: str, data: bytes) -> None:
    draft = store.create()
    draft.write_bytes(data)
    store.keep(draft, file_id)


def test_an_object_is_there_as_a_whole_or_not(store: DiskFileStore, tmp_path: Path) -> None:
    draft = store.create()
    draft.write_bytes(b"half")
    with pytest.raises(ObjectMissingError):
        store.open("file-1")
    store.keep(draft, "file-1")
    store.discard(draft)
    with store.open("file-1") as file:
        assert file.read() == b"half"
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path == tmp_path / "files"
    store.remove("file-1")
    store.remove("file-1")
    with pytest.raises(ObjectMissingError):
        store.open("file-1")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 65, "a\0b", "."])
def test_ids_are_no_paths(store: DiskFileStore, name: str) -> None:
    with pytest.raises(ObjectMissingError):
        store.open(name)


def test_what_was_left_behind_is_found_by_its_age(store: DiskFileStore) -> None:
    assert (store.older_than(0), store.clean(0)) == ([], 0)
    _keep(store, "file-old", b"x")
    _keep(store, "file-new", b"x")
    old = store.create()
    store.create()
    for path in (old, old.parent.parent / "objects" / "file-old"):
        os.utime(path, (0, 0))
    assert store.older_than(60) == ["file-old"]
    assert store.clean(60) == 1
    assert not old.exists()


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, StorageFullError), (errno.EIO, FileStoreError)]
)
def test_a_disk_that_fails_is_named(
    store: DiskFileStore, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    draft = store.create()

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.os, "fsync", fail)
    with pytest.raises(error):
        store.keep(draft, "file-1")
    monkeypatch.undo()
    with pytest.raises(ObjectMissingError):
        store.open("file-1")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("notes.txt", "notes.txt"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\in.jsonl", "in.jsonl"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie_ x"),
        ('x"; filename="y.html', "x_; filename=_y.html"),
        ("\u202egnp.exe", "gnp.exe"),
        ("u\u0308bung.txt", "\u00fcbung.txt"),
        ("...", "file"),
        ("", "file"),
        (None, "file"),
        ("x" * 400 + ".jsonl", "x" * 249 + ".jsonl"),
    ],
)
def test_names_of_files_lose_what_is_dangerous(given: str | None, kept: str) -> None:
    assert safe_name(given) == kept


def test_the_job_of_a_line_always_has_the_same_id() -> None:
    ids = [line_job_id(BATCH_ID, number) for number in range(1, 500)]
    assert len(set(ids)) == 499
    assert ids[6] == line_job_id(BATCH_ID, 7)
    assert all(_JOB_ID.fullmatch(job_id) for job_id in ids)
    assert line_job_id(new_batch_id(), 7) != ids[6]
    assert result_file_id(BATCH_ID, "output") != result_file_id(BATCH_ID, "error")


def test_lines_are_read_in_pieces() -> None:
    file = io.BytesIO(b"\xef\xbb\xbfone\r\n\n  \ntwo\nthree")
    reader = LineReader(file, max_line_bytes=100)
    found = []
    while some := reader.some(5):
        found += [(line.number, line.text) for line in some]
    assert found == [(1, b"one"), (4, b"two"), (5, b"three")]


def test_a_line_that_is_too_long_ends_the_reading() -> None:
    reader = LineReader(io.BytesIO(b"ok\n" + b"x" * 50 + b"\nmore\n"), max_line_bytes=10)
    first, second = reader.some(1000)
    assert (first.text, second.number, second.too_long) == (b"ok", 2, True)
    assert reader.some(1000) == []
    exact = LineReader(io.BytesIO(b"x" * 10 + b"\r\n"), max_line_bytes=10)
    assert exact.some(1000)[0].text == b"x" * 10


# -- results --------------------------------------------------------------------------------------
def _batch(epoch: int = 1) -> Batch:
    now = datetime.now(UTC)
    return Batch(
        id=BATCH_ID, tenant="ten_a", key_id="k", endpoint="/v1/embeddings", input_file_id="file-1",
        window=1, created_at=now, expires_at=now + timedelta(days=1), epoch=epoch,
    )  # fmt: skip


def _job(**changes: Any) -> Job:
    made: dict[str, Any] = {
        "id": "job_1", "tenant": "ten_a", "key_id": "k", "model": "m",
        "endpoint": "/v1/embeddings", "band": Band.BATCH, "status": Status.COMPLETED, "cost": 1,
        "body": b"{}", "metadata": b"{}", "stream": False, "attempt": 1, "max_attempts": 3,
        "created_ms": 1, "started_ms": 2, "finished_ms": 3, "result_ttl_s": 60,
        "request_id": "req_1", "seq": 3, "output": b'{"a":1}', "error": None, "usage": Usage(),
    }  # fmt: skip
    return Job(**{**made, **changes})


def test_results_have_the_form_of_openai() -> None:
    good = result_of(_batch(), 3, "c", _job())
    assert good.ok
    assert orjson.loads(good.text) == {
        "id": f"batch_req_{BATCH_ID.removeprefix('batch_')}_3",
        "custom_id": "c",
        "response": {"status_code": 200, "request_id": "req_1", "body": {"a": 1}},
        "error": None,
    }
    error = JobError(code="max_attempts", message="Lost.")
    bad = result_of(_batch(), 3, "c", _job(status=Status.FAILED, output=None, error=error))
    assert not bad.ok
    assert orjson.loads(bad.text)["response"]["status_code"] == 502
    expired = result_of(_batch(), 3, "c", _job(status=Status.EXPIRED, output=None))
    assert orjson.loads(expired.text)["error"]["code"] == "batch_expired"
    # Somebody cancelled this one job.
    cancelled = result_of(_batch(), 3, "c", _job(status=Status.CANCELLED))
    assert orjson.loads(cancelled.text)["response"]["body"]["error"]["code"] == "cancelled"


async def test_what_a_dead_driver_wrote_counts_and_what_it_tore_does_not(
    store: DiskFileStore, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    first = Results(folder, 1)
    first.load()
    for number in (1, 2):
        await first.add(result_of(_batch(), number, f"c{number}", _job()))
    await first.flush()
    with (folder / "0000000001.part").open("ab") as file:
        file.write(b'+ 3 {"torn')
    second = Results(folder, 2)
    second.load()
    assert (second.done, second.completed) == ({1, 2}, 2)
    error = ApiError("model_not_found")
    await second.add(refused(_batch(2), 3, "c3", error, "req_3"))
    await second.add(undone(_batch(2), 3, "c3", "batch_cancelled"))
    await second.flush()
    # The first one was not dead, and goes on.
    await first.add(result_of(_batch(), 3, "c3", _job()))
    await first.add(result_of(_batch(), 4, "c4", _job()))
    first._path = folder / "0000000001.late.part"
    await first.flush()
    merged = second.merge(store)
    ids = [
        orjson.loads(line)["custom_id"]
        for path in (merged.output, merged.errors)
        for line in path.read_bytes().splitlines()
    ]
    assert sorted(ids) == ["c1", "c2", "c3", "c4"]
    assert merged.completed + merged.failed == 4
    assert merged.output_bytes == merged.output.stat().st_size
    assert merged.errors_bytes == merged.errors.stat().st_size
