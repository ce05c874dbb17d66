"""A small async client of the jobs API.

    async with Client("http://127.0.0.1:8080", "fb_live_…") as client:
        job = await client.submit("/v1/completions", {"model": "smollm2-135m", "prompt": "Hi"})
        async for event in client.events(job.id):
            print(event.text, end="")
        job = await client.wait(job.id)

Calls that were refused for now (429, 503) or reached nobody are repeated, honouring `Retry-After`;
when only the answer is missing, those that do no harm twice. A submit is one of them: it carries an
`Idempotency-Key`, the same for all its repeats, so that a repeat finds the job. Other posts are
when the caller gives a key. An event stream that breaks is resumed after the last event seen. For
the OpenAI-compatible paths the `openai` package works as well.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

#: States a job never leaves.
TERMINAL = frozenset({"completed", "failed", "cancelled", "expired"})
_TERMINAL_EVENTS = frozenset({f"job.{status}" for status in TERMINAL})
#: Answers that mean "later": the call was not taken.
_REFUSED = frozenset({429, 503})
#: The same, and those of a proxy that doesn't know.
_RETRIED = _REFUSED | {502, 504}
#: Failures before anything was sent.
_UNSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
#: One long poll; below what proxies usually cut.
_POLL_S = 30.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class ClientError(Exception):
    """The call failed for good; the message is one line, fit to be shown."""


class ConnectionFailedError(ClientError):
    """The API can't be reached."""


class ApiError(ClientError):
    """The API refused; fields as in its error body."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(error.get("code") or "")
        self.param = error.get("param")
        self.request_id = error.get("request_id")
        message = str(error.get("message") or "no message")
        where = f" ({self.param})" if self.param else ""
        super().__init__(f"{status} {self.code}: {message}{where}".replace(" : ", ": "))


@dataclass(frozen=True, kw_only=True)
class RemoteJob:
    """A job object; `raw` has everything the API said."""

    id: str
    status: str
    model: str
    priority: str
    output: Any = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RemoteJob:
        return cls(
            id=raw["id"],
            status=raw["status"],
            model=raw.get("model", ""),
            priority=raw.get("priority", ""),
            output=raw.get("output"),
            error=raw.get("error"),
            usage=raw.get("usage") or {},
            raw=raw,
        )


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event of a job's stream."""

    #: Counts up within a job; what a resume continues after. 0 when the event has none.
    seq: int
    #: `job.queued`, `job.in_progress`, `job.delta`, `job.snapshot`, …
    type: str
    attempt: int
    #: New text of a `job.delta`; all text so far of a `job.snapshot`.
    text: str
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_terminal(self) -> bool:
        return self.type in _TERMINAL_EVENTS


class Client:
    """One tenant's access to one API. Use as an async context manager."""

    def __init__(
        self, url: str, key: str, *, timeout_s: float = 60.0, max_retries: int = 5
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._max_retries = max_retries
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # No limit on connections: every event stream holds one.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self._key}"},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- jobs -------------------------------------------------------------------------------------
    async def submit(
        self,
        endpoint: str,
        body: Mapping[str, Any],
        *,
        priority: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **terms: Any,
    ) -> RemoteJob:
        """Put a job in the queue; `endpoint` is the OpenAI path that `body` belongs to.

        `terms` are `deadline`, `execution_timeout`, `delay`, `max_attempts`, `ttl` (docs/jobs.md).
        Raises `ApiError` (e.g. 400, 401, 429 after all repeats) or `ConnectionFailedError`.
        """
        request: dict[str, Any] = {"endpoint": endpoint, "body": dict(body), **terms}
        if priority is not None:
            request["priority"] = priority
        if metadata:
            request["metadata"] = dict(metadata)
        return RemoteJob.from_json(
            await self.post(
                "/v1/jobs", request, idempotency_key=idempotency_key or uuid.uuid4().hex
            )
        )

    async def get(self, job_id: str, *, wait_s: float = 0) -> RemoteJob:
        """The job now, or as soon as it is terminal within `wait_s` (long poll)."""
        query = {"wait": f"{wait_s:g}"} if wait_s > 0 else None
        return RemoteJob.from_json(await self._call("GET", f"/v1/jobs/{job_id}", params=query))

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> RemoteJob:
        """The job once it is terminal. Raises `TimeoutError`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{job_id} is not finished after {timeout_s:g} s")
            job = await self.get(job_id, wait_s=min(left, _POLL_S))
            if job.is_terminal:
                return job

    async def list_jobs(self, *, limit: int = 20, **filters: str | None) -> list[RemoteJob]:
        """The newest jobs; `filters` are `status`, `model`, `priority`, `after`, `order`."""
        query = {name: value for name, value in filters.items() if value is not None}
        page = await self._call("GET", "/v1/jobs", params={"limit": str(limit), **query})
        return [RemoteJob.from_json(raw) for raw in page["data"]]

    async def cancel(self, job_id: str) -> RemoteJob:
        """Ask the job to stop; its status may still be `cancelling`."""
        return RemoteJob.from_json(
            await self._call("POST", f"/v1/jobs/{job_id}/cancel", harmless=True)
        )

    async def cancel_many(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Cancel up to 1,000 jobs; `cancelled`, `cancelling`, `terminal` or `not_found` by id."""
        answer = await self._call(
            "POST", "/v1/jobs/cancel", json={"ids": list(job_ids)}, harmless=True
        )
        return {entry["id"]: entry["result"] for entry in answer["data"]}

    async def retry(self, job_id: str) -> RemoteJob:
        """Put a failed or expired job in again."""
        return RemoteJob.from_json(await self._call("POST", f"/v1/jobs/{job_id}/retry"))

    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events from the one after `after` to the terminal one.

        Survives broken connections as long as one event comes through between two of them or the
        repeats last; raises `ConnectionFailedError` then.
        """
        failures = 0
        while True:
            try:
                async for event in self._stream(job_id, after):
                    failures = 0
                    after = max(after, event.seq)
                    yield event
                    if event.is_terminal:
                        return
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                failures += 1
                if failures > self._max_retries:
                    raise ConnectionFailedError(f"the event stream broke: {_say(error)}") from None
            else:
                # The server may end a stream (shutdown, time limit) before the job is over.
                failures += 1
                if failures > self._max_retries:
                    raise ConnectionFailedError("the event stream ended before the job")
            await asyncio.sleep(_pause(failures, None))

    # -- OpenAI-compatible ------------------------------------------------------------------------
    async def chat(self, model: str, messages: list[Mapping[str, str]], **body: Any) -> Any:
        """`POST /v1/chat/completions`, waiting for the answer; returns the response body."""
        return await self.post(
            "/v1/chat/completions", {"model": model, "messages": list(messages), **body}
        )

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        answer = await self.post("/v1/embeddings", {"model": model, "input": texts})
        return [item["embedding"] for item in answer["data"]]

    async def models(self) -> list[Mapping[str, Any]]:
        data: list[Mapping[str, Any]] = (await self._call("GET", "/v1/models"))["data"]
        return data

    async def post(
        self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Any:
        """Any other JSON call. With a key a repeat finds the first call's job, for 24 hours."""
        if idempotency_key is None:
            return await self._call("POST", path, json=body)
        headers = {"Idempotency-Key": idempotency_key}
        return await self._call("POST", path, json=body, headers=headers, harmless=True)

    async def call(self, method: str, path: str, **query: str | None) -> Any:
        """Any other call without a body."""
        params = {name: value for name, value in query.items() if value is not None}
        return await self._call(method, path, params=params)

    # -- transport --------------------------------------------------------------------------------
    async def _call(
        self, method: str, path: str, *, harmless: bool | None = None, **options: Any
    ) -> Any:
        """One call with its repeats; `harmless`: may be carried out twice (every GET is)."""
        if harmless is None:
            harmless = method == "GET"
        retried = _RETRIED if harmless else _REFUSED
        assert self._session is not None, "use the client as an async context manager"
        failures = 0
        while True:
            retry_after: str | None = None
            try:
                async with self._session.request(
                    method, self._url + path, timeout=self._timeout, **options
                ) as response:
                    if response.status < 400:
                        return await response.json()
                    refusal = await _refusal(response)
                    retry_after = response.headers.get("Retry-After")
                    if response.status not in retried or failures >= self._max_retries:
                        raise refusal
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if not harmless and not isinstance(error, _UNSENT):
                    raise ConnectionFailedError(
                        f"no answer from {self._url}, and the call may have been taken:"
                        f" {_say(error)}"
                    ) from None
                if failures >= self._max_retries:
                    raise ConnectionFailedError(
                        f"{self._url} can't be reached: {_say(error)}"
                    ) from None
            failures += 1
            await asyncio.sleep(_pause(failures, retry_after))

    async def _stream(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        assert self._session is not None, "use the client as an async context manager"
        headers = {"Accept": "text/event-stream"}
        if after:
            headers["Last-Event-ID"] = str(after)
        # Pings come every few seconds; a silent minute means a dead connection.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        async with self._session.get(
            f"{self._url}/v1/jobs/{job_id}/events", headers=headers, timeout=timeout
        ) as response:
            if response.status >= 400:
                refusal = await _refusal(response)
                if response.status in _RETRIED:
                    raise aiohttp.ClientPayloadError(str(refusal))
                raise refusal
            async for event in _parse(response.content):
                yield event


async def _parse(content: aiohttp.StreamReader) -> AsyncIterator[JobEvent]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    fields: dict[str, str] = {}
    # Chunks, not lines: a snapshot may be longer than the reader's line limit.
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.rstrip(b"\r").decode()
            if line:
                name, _, value = line.partition(":")
                if name:
                    value = value.removeprefix(" ")
                    joined = f"{fields[name]}\n{value}" if name in fields else value
                    fields[name] = joined if name == "data" else value
                continue
            if "data" in fields:
                yield _event(fields)
            fields = {}


def _event(fields: Mapping[str, str]) -> JobEvent:
    try:
        data = json.loads(fields["data"])
    except ValueError:
        data = {}
    if not isinstance(data, dict):
        data = {}
    seq = fields.get("id", "")
    return JobEvent(
        seq=int(seq) if seq.isdigit() else int(data.get("seq") or 0),
        type=fields.get("event") or str(data.get("type", "message")),
        attempt=int(data.get("attempt") or 0),
        text=str(data.get("text") or ""),
        data=data,
    )


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    try:
        body = await response.json(content_type=None)
    except (ValueError, aiohttp.ClientError):
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": response.reason or "no message"}
    return ApiError(response.status, error)


def _pause(failures: int, retry_after: str | None) -> float:
    """Seconds before the next try: what the server asked for, else exponential with jitter."""
    try:
        if retry_after is not None:
            return min(max(float(retry_after), 0.0), 60.0)
    except ValueError:
        pass
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads repeats, guards nothing


def _say(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
