"""The lines of a batch's input: read in pieces, checked one by one, turned into jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO, Final

import orjson

from api.accounts.batches import Batch
from api.errors import ApiError
from api.files.ids import line_job_id
from api.handlers.intake import checked
from api.schemas.batches import LINES
from api.schemas.inference import InferenceRequest
from api.schemas.parsing import parse
from api.schemas.responses import ResponseRequest
from broker.jobs import Band, NewJob
from config.catalogue import ModelSpec

_BOM: Final = b"\xef\xbb\xbf"
#: Problems told of one input; nobody reads more.
MAX_PROBLEMS: Final = 100


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that isn't blank; `number` counts from 1, blank ones too."""

    number: int
    text: bytes
    #: It is longer than any request may be, and was read in part.
    too_long: bool = False


class LineReader:
    """Blocking; reads an open file from its beginning."""

    def __init__(self, file: BinaryIO, *, max_line_bytes: int) -> None:
        self._file = file
        self._limit = max_line_bytes
        self._number = 0

    def some(self, about_bytes: int) -> list[RawLine]:
        """The next lines; none at the end, and none after one that is too long."""
        found: list[RawLine] = []
        size = 0
        while size < about_bytes and (text := self._file.readline(self._limit + 2)):
            self._number += 1
            size += len(text)
            line = text.removesuffix(b"\n").removesuffix(b"\r")
            if self._number == 1:
                line = line.removeprefix(_BOM)
            if len(line) > self._limit:
                found.append(RawLine(self._number, b"", too_long=True))
                # Where it ends isn't worth finding out.
                self._file.seek(0, 2)
            elif line.strip():
                found.append(RawLine(self._number, line))
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """A checked line."""

    number: int
    custom_id: str
    wanted: InferenceRequest
    spec: ModelSpec


class LineChecker:
    """What one line asks for, under the rules of the endpoint it is sent to."""

    def __init__(
        self, endpoint: str, catalogue: Mapping[str, ModelSpec], *, max_line_bytes: int
    ) -> None:
        self._schema = LINES[endpoint]
        self._endpoint = endpoint
        self._catalogue = catalogue
        self._limit = max_line_bytes

    def check(self, line: RawLine) -> Request:
        """Raises `ApiError`, naming the parameter and never its value."""
        if line.too_long:
            raise ApiError("payload_too_large", f"A line may have at most {self._limit} bytes.")
        parsed: Any = parse(self._schema, line.text)
        wanted: InferenceRequest = parsed.body
        if wanted.streams:
            raise ApiError("unsupported_parameter", "A batch doesn't stream.", param="body.stream")
        if wanted.logprobs_wanted:
            # Whether the tenant may have them can change before the line runs.
            message = "A batch has no logprobs."
            raise ApiError("unsupported_parameter", message, param="body.logprobs")
        if wanted.band not in (None, Band.BATCH):
            name = "priority" if wanted.priority is not None else "service_tier"
            raise ApiError(
                "unsupported_parameter",
                "All lines of a batch have the priority batch.",
                param=f"body.{name}",
            )
        if isinstance(wanted, ResponseRequest):
            _check_alone(wanted)
        spec = checked(self._catalogue, wanted, "body.")
        return Request(line.number, parsed.custom_id, wanted, spec)


def _check_alone(wanted: ResponseRequest) -> None:
    """Lines run in any order, long after they were checked: none goes on from what was said."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(wanted, name):
            raise ApiError(
                "unsupported_parameter", "A batch doesn't know this.", param=f"body.{name}"
            )


class Validation:
    """Checks a whole input and remembers what is wrong with it."""

    def __init__(self, checker: LineChecker, *, max_lines: int) -> None:
        self._checker = checker
        self._max_lines = max_lines
        self._seen: set[bytes] = set()
        self.problems: list[dict[str, Any]] = []
        self.total = 0

    @property
    def over(self) -> bool:
        """There is no use in looking further."""
        return len(self.problems) >= MAX_PROBLEMS or self.total > self._max_lines

    def take(self, line: RawLine) -> None:
        self.total += 1
        if self.total > self._max_lines:
            message = f"A batch has at most {self._max_lines} lines."
            self._note("too_many_lines", message, line.number)
            return
        try:
            request = self._checker.check(line)
        except ApiError as error:
            self._note(error.code, error.message, line.number, error.param)
            return
        # Digests: 50,000 long names would be worth as much memory as a file.
        digest = blake2b(request.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            message = "Another line before it has the same custom_id."
            self._note("duplicate_custom_id", message, line.number, "custom_id")
        self._seen.add(digest)

    def end(self) -> None:
        """All lines were taken."""
        if not self.total:
            self._note("empty_file", "The file has no lines.", None)

    def _note(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        self.problems.append({"code": code, "line": line, "message": message, "param": param})


def line_job(batch: Batch, request: Request, *, max_attempts: int, result_ttl_s: int) -> NewJob:
    """The job of a line: in the batch band, under no rate limit, with an id of its own."""
    job_id = line_job_id(batch.id, request.number)
    body = request.wanted.to_body()
    return NewJob(
        id=job_id,
        tenant=batch.tenant,
        key_id=batch.key_id,
        model=request.spec.name,
        endpoint=request.wanted.endpoint,
        band=Band.BATCH,
        cost=request.wanted.cost(body, request.spec),
        body=body,
        # A response shows the metadata it was sent with.
        metadata=orjson.dumps(
            {
                **(request.wanted.metadata or {}),
                "batch_id": batch.id,
                "custom_id": request.custom_id,
            }
        ),
        max_attempts=max_attempts,
        result_ttl_s=result_ttl_s,
        # Times out in the queue by itself when nobody is there to see to it.
        deadline_ms=int(batch.expires_at.timestamp() * 1000),
        request_id=request_id_of(job_id),
    )


def request_id_of(job_id: str) -> str:
    return "req_" + job_id.removeprefix("job_")
