"""HTTP calls that are repeated when that is safe, and event streams that go on where they broke."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import aiohttp

from api.sdk.errors import ApiError, ConnectionFailedError
from api.sdk.event_stream import parse
from api.sdk.objects import JobEvent

#: Answers that mean "later": the call was not taken.
_REFUSED = frozenset({429, 503})
#: The same, and those of a proxy that doesn't know.
_RETRIED = _REFUSED | {502, 504}
#: Failures before anything was sent.
_UNSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_BROKEN = (aiohttp.ClientError, TimeoutError, ConnectionError)
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
#: Longest pause a server may ask for.
_LONGEST_ASKED_S = 60.0


class Transport:
    """Connections to one API with one key."""

    def __init__(self, url: str, key: str, *, timeout_s: float, max_retries: int) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._max_retries = max_retries
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        # No limit on connections: every event stream holds one.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self._key}"},
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self, method: str, path: str, *, harmless: bool | None = None, **options: Any
    ) -> Any:
        """The JSON of one call with its repeats; `options` are aiohttp's.

        `harmless`: may be carried out twice (every GET is). Raises `ApiError`,
        `ConnectionFailedError`.
        """
        if harmless is None:
            harmless = method == "GET"
        retried = _RETRIED if harmless else _REFUSED
        failures = 0
        while True:
            asked: float | None = None
            try:
                async with self._opened().request(
                    method, self._url + path, timeout=self._timeout, **options
                ) as response:
                    if response.status < 400:
                        return await response.json()
                    refusal = await _refusal(response)
                    asked = _asked_pause(response.headers)
                    if response.status not in retried or failures >= self._max_retries:
                        raise refusal
            except _BROKEN as error:
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
            await asyncio.sleep(_pause(failures, asked))

    async def events(self, path: str, after: int) -> AsyncGenerator[JobEvent, None]:
        """The events after `after` up to the last one, each once and in order.

        A connection that breaks, or that the server ends because it stops, is followed by another
        one, which the server begins after the last event seen. Raises `ApiError`, and
        `ConnectionFailedError` when no event comes between more breaks than there may be repeats.
        """
        failures = 0
        while True:
            reason = "it ended before the job"
            try:
                async with aclosing(self._stream(path, after)) as stream:
                    async for event in stream:
                        if event is None:
                            return
                        if 0 < event.seq <= after:
                            continue
                        failures = 0
                        after = max(after, event.seq)
                        yield event
                        if event.is_terminal:
                            return
            except _BROKEN as error:
                reason = f"it broke: {_say(error)}"
            failures += 1
            if failures > self._max_retries:
                raise ConnectionFailedError(f"the event stream can't be followed: {reason}")
            await asyncio.sleep(_pause(failures, None))

    async def _stream(self, path: str, after: int) -> AsyncGenerator[JobEvent | None, None]:
        """Events of one connection; None when the server says that none will follow."""
        headers = {"Accept": "text/event-stream"}
        if after:
            headers["Last-Event-ID"] = str(after)
        # Pings come every few seconds; a silent minute means a dead connection.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        async with self._opened().get(
            self._url + path, headers=headers, timeout=timeout
        ) as response:
            if response.status == 204:
                yield None
                return
            if response.status >= 400:
                refusal = await _refusal(response)
                if response.status in _RETRIED:
                    raise aiohttp.ClientPayloadError(str(refusal))
                raise refusal
            async for event in parse(response.content.iter_any()):
                yield event

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use the client as a context manager")
        return self._session


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    try:
        body = await response.json(content_type=None)
    except (ValueError, aiohttp.ClientError):
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": response.reason or "no message"}
    return ApiError(response.status, error)


def _asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: `retry-after-ms`, which is finer, or `Retry-After`."""
    for name, unit in (("retry-after-ms", 1000.0), ("Retry-After", 1.0)):
        try:
            return min(max(float(headers[name]) / unit, 0.0), _LONGEST_ASKED_S)
        except (KeyError, ValueError):
            continue
    return None


def _pause(failures: int, asked: float | None) -> float:
    """Seconds before the next try: what the server asked for, else exponential with jitter."""
    if asked is not None:
        return asked
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads repeats, guards nothing


def _say(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
