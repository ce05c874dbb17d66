"""Server-sent events on an aiohttp response."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping

from aiohttp import hdrs, web

from api import keys
from config.logs import get_logger

log = get_logger(__name__)

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    hdrs.SERVER: "forebay",
    # nginx holds a stream back otherwise.
    "X-Accel-Buffering": "no",
}

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def data(payload: bytes) -> bytes:
    """A nameless event, as OpenAI's streams have them; `payload` is JSON on one line."""
    return b"data: %b\n\n" % payload


def event(seq: int, name: str, payload: bytes) -> bytes:
    """A named event that a reader can resume after."""
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, name.encode(), payload)


class EventStream(web.StreamResponse):
    """Cuts off a reader that takes nothing for `stall_s`; the write raises `ConnectionError`."""

    def __init__(self, request: web.Request, headers: Mapping[str, str], *, stall_s: float) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        self._request = request
        self._stall_s = stall_s

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._bounded(super().write(data))

    async def write_eof(self, data: bytes = b"") -> None:
        await self._bounded(super().write_eof(data))

    async def _bounded(self, writing: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await writing
        except TimeoutError:
            log.info("reader_cut", stalled_s=self._stall_s)
            if self._request.transport is not None:
                # Not closed: that would wait for the reader too.
                self._request.transport.abort()
            raise ConnectionResetError("the reader takes nothing") from None


async def open_stream(request: web.Request, headers: Mapping[str, str]) -> EventStream:
    """Send the headers; events are then written to the response."""
    stall_s = request.app[keys.SETTINGS].api.write_timeout_s
    response = EventStream(request, headers, stall_s=stall_s)
    await response.prepare(request)
    return response
