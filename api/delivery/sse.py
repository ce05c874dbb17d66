"""Server-sent events on an aiohttp response."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import hdrs, web

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


async def open_stream(request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
    """Send the headers; events are then written to the response."""
    response = web.StreamResponse(headers={**_HEADERS, **headers})
    await response.prepare(request)
    return response
