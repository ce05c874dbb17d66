"""The lines of a batch's input: read in pieces, checked one by one, turned into jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import orjson
from pydantic import ValidationError

from api.accounts.batch import Batch
from api.errors import ApiError
from api.files.ids import line_job_id
from api.handlers.intake import checked
from api.schemas.batches import ENVELOPE, LINES, Envelope
from api.schemas.inference import InferenceRequest
from api.schemas.parsing import parse, refusal
from api.schemas.responses import ResponseRequest
from broker.jobs import Band, NewJob
from config.catalogue import ModelSpec

_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that isn't blank; `number` counts from 1, blank ones too."""

    number: int
    text: bytes
    #: It is longer than any request may be, and was read in part.
    too_long: bool = False


class BadLineError(Exception):
    """A line that can't be run or told apart: its batch fails. Never repeats what it says."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


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

    def open(self, line: RawLine) -> Envelope:
        """What the line has around its request. Raises `BadLineError`."""
        if line.too_long:
            raise BadLineError("payload_too_large", f"It has more than {self._limit} bytes.")
        try:
            envelope: Envelope = ENVELOPE.validator.validate_json(line.text)
        except ValidationError as error:
            if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
                raise BadLineError("invalid_json_line", "It is not valid JSON.") from None
            told = refusal(error)
            raise BadLineError(told.code, told.message, told.param) from None
        if envelope.url != self._endpoint:
            message = f"It must be the endpoint of the batch, {self._endpoint}."
            raise BadLineError("invalid_request", message, "url")
        return envelope

    def check(self, line: RawLine) -> Request:
        """What its request is. Raises `ApiError`, naming the parameter and never its value."""
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


def line_job(batch: Batch, request: Request, *, max_attempts: int, result_ttl_s: int) -> NewJob:
    """The job of a line: in the batch band, under no rate limit, with an id of its own."""
    job_id = line_job_id(batch.id, request.number)
    body = request.wanted.to_body()
    return NewJob(
        id=job_id,
        tenant=batch.tenant,
        key_id=batch.key_id,
        batch_line=True,
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
