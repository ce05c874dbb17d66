"""What came of a batch's lines, gathered on disk as they end, and made into its two files.

Each driver appends to a file of its own, named by the epoch of its claim. A restart reads them all
to know what is done; so nothing is lost when one dies in the middle of a line, and nothing counted
twice when one that was thought dead goes on for a while: the first record of a line is the one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from api.accounts.batch import Batch
from api.errors import CODES, ApiError, error_object, from_job
from api.files.store import FileStore, FileStoreError, translated
from api.schemas.job_object import rendered_output
from broker.jobs import Job, Status, Usage

#: Bytes that wait to be written before those who bring more have to wait.
_MOST_WAITING: Final = 1024 * 1024
_SUFFIX: Final = ".part"


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a line, as it stands in one of the two files."""

    number: int
    ok: bool
    text: bytes


def result_of(batch: Batch, number: int, custom_id: str, job: Job) -> Result:
    """From the record of a line's job, in OpenAI's format."""
    if job.status is Status.COMPLETED and job.output is not None:
        response = {
            "status_code": 200,
            "request_id": job.request_id,
            "body": rendered_output(job),
        }
        return _result(batch, number, custom_id, response, None)
    if job.status is Status.EXPIRED:
        return undone(batch, number, custom_id, "batch_expired")
    return refused(batch, number, custom_id, from_job(job), job.request_id)


def refused(batch: Batch, number: int, custom_id: str, error: ApiError, request_id: str) -> Result:
    """A line whose request was answered with an error."""
    response = {
        "status_code": CODES[error.code].status,
        "request_id": request_id,
        "body": {"error": error_object(error, request_id)},
    }
    return _result(batch, number, custom_id, response, None)


def undone(batch: Batch, number: int, custom_id: str, code: str) -> Result:
    """A line that was not done before its batch ended: `batch_expired` or `batch_cancelled`."""
    message = {
        "batch_expired": "The request was not done within the completion window.",
        "batch_cancelled": "The batch was cancelled before the request was done.",
    }[code]
    return _result(batch, number, custom_id, None, {"code": code, "message": message})


def _result(
    batch: Batch, number: int, custom_id: str, response: dict[str, Any] | None, error: Any
) -> Result:
    line = {
        "id": f"batch_req_{batch.id.removeprefix('batch_')}_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    ok = response is not None and response["status_code"] == 200
    return Result(number, ok, orjson.dumps(line))


@dataclass(frozen=True, slots=True)
class Merged:
    """A batch's two files, written and not kept yet."""

    output: Path
    errors: Path
    output_bytes: int
    errors_bytes: int
    completed: int
    failed: int
    #: Of the lines that were done.
    usage: Usage


class Results:
    """The results of one batch, as one driver adds to them."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self._folder = folder
        self._path = folder / f"{epoch:010d}{_SUFFIX}"
        self._waiting: list[bytes] = []
        self._size = 0
        self._lock = asyncio.Lock()
        #: A write failed and may have left half a record: nothing comes after it.
        self._broken = False
        #: Numbers of lines that have ended.
        self.done: set[int] = set()
        self.completed = 0
        self.failed = 0

    def load(self) -> None:
        """Blocking: find out what earlier drivers have done. Raises `FileStoreError`."""
        with translated():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for result in _read(self._folder):
            self._count(result)

    async def add(self, result: Result) -> None:
        """Write it, in time, unless the line has ended before. Raises `FileStoreError`."""
        if not self._count(result):
            return
        record = b"%c %d %b\n" % (b"+" if result.ok else b"-", result.number, result.text)
        self._waiting.append(record)
        self._size += len(record)
        if self._size > _MOST_WAITING:
            await self.flush()

    async def flush(self) -> None:
        """Bring all that was added to the disk. Raises `FileStoreError`."""
        async with self._lock:
            if self._waiting:
                records, self._waiting, self._size = self._waiting, [], 0
                await asyncio.to_thread(self._append, b"".join(records))

    def _append(self, data: bytes) -> None:
        if self._broken:
            raise FileStoreError("an earlier write has failed")
        self._broken = True
        try:
            with translated():
                handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(handle)
        except FileNotFoundError:
            raise FileStoreError("the folder of the batch is gone") from None
        self._broken = False

    def merge(self, store: FileStore) -> Merged:
        """Blocking: write the two files, each line once. Raises `FileStoreError`."""
        output, errors = store.create(), store.create()
        merged: set[int] = set()
        sizes, counts, tokens = [0, 0], [0, 0], [0, 0, 0]
        with translated(), output.open("wb") as good, errors.open("wb") as bad:
            for result in _read(self._folder):
                if result.number in merged:
                    continue
                merged.add(result.number)
                (good if result.ok else bad).write(result.text + b"\n")
                sizes[result.ok] += len(result.text) + 1
                counts[result.ok] += 1
                if result.ok:
                    tokens = [sum(pair) for pair in zip(tokens, _tokens(result), strict=True)]
        usage = Usage(input_tokens=tokens[0], cached_tokens=tokens[1], output_tokens=tokens[2])
        return Merged(output, errors, sizes[1], sizes[0], counts[1], counts[0], usage)

    def _count(self, result: Result) -> bool:
        if result.number in self.done:
            return False
        self.done.add(result.number)
        if result.ok:
            self.completed += 1
        else:
            self.failed += 1
        return True


def forget(folder: Path) -> None:
    """Blocking: drop the results of a batch that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def _tokens(result: Result) -> tuple[int, int, int]:
    """Input, cached and output tokens of a line that was done, whatever its endpoint calls them."""
    told = orjson.loads(result.text)["response"]["body"].get("usage") or {}
    details = told.get("input_tokens_details") or told.get("prompt_tokens_details") or {}
    return (
        told.get("input_tokens", told.get("prompt_tokens", 0)),
        details.get("cached_tokens", 0),
        told.get("output_tokens", told.get("completion_tokens", 0)),
    )


def _read(folder: Path) -> Iterator[Result]:
    with translated():
        parts = sorted(folder.glob(f"*{_SUFFIX}"))
    for part in parts:
        with translated(), part.open("rb") as file:
            for line in file:
                # What a dying process has written in part ends without a line break.
                if line.endswith(b"\n"):
                    sign, number, text = line[:-1].split(b" ", 2)
                    yield Result(int(number), sign == b"+", text)
