"""What every file store promises, on a disk and on an S3-compatible server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import openai
import pytest

from api.files import s3 as s3_module
from api.files.s3 import S3FileStore, open_bucket
from api.files.store import DiskFileStore, FileStore, FileStoreError, ObjectMissingError
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, make_database, serving
from tests.conftest import free_port, missing
from tests.s3lab import BUCKET, KEY, SECRET, is_installed, s3_server

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not is_installed():
        missing("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


def _bucket(endpoint: str, prefix: str, bucket: str = BUCKET) -> Any:
    return open_bucket(
        f"s3://{bucket}/{prefix}", endpoint=endpoint, region="us-east-1", key_id=KEY,
        secret=SECRET, timeout_s=10.0,
    )  # fmt: skip


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    if request.param == "disk":
        return DiskFileStore(tmp_path / "files")
    server = request.getfixturevalue("server")
    return S3FileStore(_bucket(server, f"env/{tmp_path.name}"), tmp_path / "files")


def _keep(store: FileStore, file_id: str, data: bytes) -> None:
    draft = store.create()
    draft.write_bytes(data)
    store.keep(draft, file_id)


def test_an_object_is_there_as_a_whole_or_not(store: FileStore, tmp_path: Path) -> None:
    draft = store.create()
    draft.write_bytes(b"half")
    with pytest.raises(ObjectMissingError):
        store.open("file-1")
    store.keep(draft, "file-1")
    assert not draft.exists()
    store.discard(draft)
    with store.open("file-1") as file:
        assert file.read() == b"half"
    assert not list((tmp_path / "files" / "drafts").iterdir())
    store.remove("file-1")
    store.remove("file-1")
    with pytest.raises(ObjectMissingError):
        store.open("file-1")


def test_what_is_kept_again_replaces_what_is_there(store: FileStore) -> None:
    _keep(store, "file-1", b"the first")
    _keep(store, "file-1", b"second")
    with store.open("file-1") as file:
        assert file.read() == b"second"


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 65, "a\0b", "."])
def test_ids_are_no_paths(store: FileStore, name: str) -> None:
    with pytest.raises(ObjectMissingError):
        store.open(name)
    draft = store.create()
    with pytest.raises(ObjectMissingError):
        store.keep(draft, name)


@pytest.mark.parametrize("size", [0, 1, MIB, 6 * MIB + 7])
def test_any_size_comes_back(store: FileStore, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The least that a store takes as a part: the largest of these has two.
    monkeypatch.setattr(s3_module, "_PART", 5 * MIB)
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    _keep(store, "file-1", data)
    with store.open("file-1") as file:
        assert file.read() == data
        assert file.seek(0, 2) == size
        assert file.read() == b""
        for at in (0, size // 3, max(size - 5, 0), size + 9):
            file.seek(at)
            assert file.read(300) == data[at : at + 300]


def test_lines_are_read_from_any_place(store: FileStore) -> None:
    lines = [f"{number}:".encode() + b"x" * (number % 3000) + b"\n" for number in range(3_000)]
    _keep(store, "file-1", b"".join(lines))
    with store.open("file-1") as file:
        assert file.readlines() == lines
        file.seek(len(lines[0]))
        assert file.readline(4) == lines[1][:4]


def test_what_was_left_behind_is_found_by_its_age(store: FileStore) -> None:
    assert (store.older_than(0), store.clean(0)) == ([], 0)
    for name in ("file-1", "file-2"):
        _keep(store, name, b"x")
    # Servers tell whole seconds.
    assert sorted(store.older_than(-5)) == ["file-1", "file-2"]
    assert store.older_than(3600) == []
    store.create()
    assert store.clean(3600) == 0
    assert store.clean(-5) == 1


# -- S3 alone -------------------------------------------------------------------------------------
def test_a_prefix_is_a_world_of_its_own(server: str, tmp_path: Path) -> None:
    one = S3FileStore(_bucket(server, "one"), tmp_path)
    two = S3FileStore(_bucket(server, "two/"), tmp_path)
    _keep(one, "file-1", b"x")
    for theirs in ("sub/file-3", "backup", "archive-2026"):
        obstore.put(_bucket(server, "one"), theirs, b"not ours")
    assert (one.older_than(-5), two.older_than(-5)) == (["file-1"], [])
    assert obstore.head(_bucket(server, ""), "one/file-1")["size"] == 1
    with pytest.raises(ObjectMissingError):
        two.open("file-1")


def test_a_store_that_fails_is_named_and_nothing_of_it(server: str, tmp_path: Path) -> None:
    away = S3FileStore(_bucket(f"http://127.0.0.1:{free_port()}", "x"), tmp_path)
    other = S3FileStore(_bucket(server, "x", bucket="no-such-bucket"), tmp_path)
    for call in (
        lambda: _keep(away, "file-1", b"x"),
        lambda: away.open("file-1"),
        lambda: away.remove("file-1"),
        lambda: away.older_than(0),
        lambda: _keep(other, "file-1", b"x"),
        lambda: other.older_than(0),
    ):
        with pytest.raises(FileStoreError) as failed:
            call()
        assert type(failed.value) is FileStoreError
        assert "127.0.0.1" not in str(failed.value)
        assert KEY not in str(failed.value)


def test_a_file_that_shrinks_or_goes_while_it_is_read(server: str, tmp_path: Path) -> None:
    store = S3FileStore(_bucket(server, "gone"), tmp_path)
    _keep(store, "file-1", b"x" * (3 * MIB))
    with store.open("file-1") as file:
        assert len(file.read(MIB)) == MIB
        store.remove("file-1")
        with pytest.raises(FileStoreError):
            file.read(MIB)


async def test_a_batch_through_a_bucket(server: str, tmp_path: Path) -> None:
    settings = load(
        _env_file=None,
        data_dir=tmp_path,
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        batches={"poll_s": 0.1},
        files={
            "url": f"s3://{BUCKET}/api", "s3_endpoint": server, "s3_access_key_id": KEY,
            "s3_secret_access_key": SECRET,
        },
    )  # fmt: skip
    make_database(settings)
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    line = (
        '{"custom_id": "1", "method": "POST", "url": "/v1/completions", '
        f'"body": {{"model": "{CHAT}", "prompt": "hi"}}}}'
    )
    async with (
        serving(settings, memory, AsyncMemoryQueue(memory), hub, storage=True) as api,
        openai.AsyncOpenAI(base_url=api.url + "v1", api_key="a", max_retries=0) as client,
    ):
        file = await client.files.create(file=("in.jsonl", line.encode()), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        async with asyncio.timeout(30):
            while batch.status != "completed":
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
        assert "one two three" in (await client.files.content(batch.output_file_id or "")).text
        kept = S3FileStore(_bucket(server, "api"), tmp_path).older_than(-5)
        assert sorted(kept) == sorted([file.id, batch.output_file_id])
        await client.files.delete(file.id)
        assert S3FileStore(_bucket(server, "api"), tmp_path).older_than(-5) == [
            batch.output_file_id
        ]
    await hub.stop()


class _Zeros(BaseHTTPRequestHandler):
    """Takes an upload in parts and gives so many zeros back, as fast as it can be asked."""

    protocol_version = "HTTP/1.1"
    size = 192 * MIB
    uploaded = 0

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = "uploadId=" in self.path
        body = b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
        start = (
            b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        )
        self._answer(200, body if done else start, ETag='"e"')

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        type(self).uploaded += left
        while left:
            left -= len(self.rfile.read(min(left, MIB)))
        self._answer(200, ETag='"e"')

    def do_HEAD(self) -> None:
        self._answer(200, **self._described(), Content_Length=self.size)

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = bytes(min(last, self.size - 1) - first + 1)
        where = f"bytes {first}-{first + len(body) - 1}/{self.size}"
        self._answer(206, body, **self._described(), Content_Range=where)

    def _described(self) -> dict[str, str]:
        return {"ETag": '"e"', "Last-Modified": "Tue, 24 Nov 2026 12:00:00 GMT"}


_LARGE = """
import sys, resource
from pathlib import Path
from api.files.s3 import S3FileStore, open_bucket
bucket = open_bucket("s3://files/large", endpoint=sys.argv[1], region="us-east-1", key_id="k",
                     secret="s", timeout_s=30)
store = S3FileStore(bucket, Path(sys.argv[2]))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
draft = store.create()
with draft.open("wb") as file:
    file.truncate(192 * 1024 * 1024)
store.keep(draft, "file-large")
size = 0
with store.open("file-large") as file:
    while data := file.read(256 * 1024):
        size += len(data)
assert size == 192 * 1024 * 1024
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Zeros)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", _LARGE, endpoint, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    assert done.returncode == 0, done.stderr
    assert _Zeros.uploaded == _Zeros.size
    assert int(done.stdout) < 64, "MiB for a file of 192"
