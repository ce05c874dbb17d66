"""Reading what a request brings: its body, bounded, and what it prefers."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

from aiohttp import StreamReader, hdrs, web

from api import keys
from api.errors import ApiError

#: Forms are what a browser sends across origins without asking; JSON never comes as one.
_FORMS: Final = ("multipart/", "application/x-www-form-urlencoded")


#: Chunks a body may have, and one more for each so many bytes.
_FREE_CHUNKS: Final = 1_024
_MIN_CHUNK_BYTES: Final = 64


async def read_body(request: web.Request) -> bytes:
    """The raw body. Raises `ApiError` when it is too large, too slow, compressed or a form."""
    headers = request.headers
    limit = request.client_max_size
    length = request.content_length
    if length is not None and length > limit:
        raise too_large(limit)
    if headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        # What a compressed body unpacks to is known too late.
        raise ApiError("unsupported_media_type", "Compressed bodies are not supported.")
    if headers.get(hdrs.CONTENT_TYPE, "").lower().startswith(_FORMS):
        raise ApiError("unsupported_media_type", "The body must be JSON.")
    try:
        if length is not None and request.content.is_eof():
            # Most bodies are here already.
            return await request.read()
        async with asyncio.timeout(request.app[keys.SETTINGS].api.read_timeout_s):
            if length is None:
                return await _read_chunks(request.content, limit)
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limit) from None
    except TimeoutError:
        raise ApiError("request_timeout") from None


async def _read_chunks(content: StreamReader, limit: int) -> bytes:
    """A chunked body. Each chunk costs time whatever it holds, so tiny ones are refused."""
    body, ends = bytearray(), 0
    async for data, ends_here in content.iter_chunks():
        body += data
        ends += ends_here
        if len(body) > limit:
            raise too_large(limit)
        if ends > _FREE_CHUNKS + len(body) // _MIN_CHUNK_BYTES:
            raise ApiError("invalid_request", "The body comes in too many chunks.")
    return bytes(body)


def too_large(limit: int) -> ApiError:
    return ApiError("payload_too_large", f"The body may have at most {limit} bytes.")


async def expect(request: web.Request) -> None:
    """`Expect: 100-continue`: a body that is too large isn't asked for."""
    await ask_for(request, request.client_max_size)


async def ask_for(request: web.Request, limit: int) -> None:
    """Have the body sent unless it is longer than `limit`."""
    if (request.content_length or 0) <= limit:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The interim answer is no part of the final one.
        request.writer.output_size = 0


@dataclass(frozen=True, slots=True)
class Preference:
    """The parts of `Prefer` (RFC 7240) that mean something here."""

    respond_async: bool = False
    #: Seconds; None when not given.
    wait_s: int | None = None

    @property
    def applied(self) -> dict[str, str]:
        """The header that tells which of them were honoured."""
        names = ["respond-async"] if self.respond_async else []
        if self.wait_s is not None:
            names.append(f"wait={self.wait_s}")
        return {"Preference-Applied": ", ".join(names)} if names else {}


#: No preference.
ANYHOW: Final = Preference()
_WAIT: Final = re.compile(r'wait\s*=\s*"?(\d{1,6})"?')


def preference(request: web.Request, *, max_wait_s: float) -> Preference:
    """What the caller prefers; as the RFC asks, what can't be understood is ignored."""
    if "Prefer" not in request.headers:
        return ANYHOW
    respond_async, wait_s = False, None
    for header in request.headers.getall("Prefer"):
        for part in header.split(","):
            name = part.partition(";")[0].strip().lower()
            if name == "respond-async":
                respond_async = True
            elif wait_s is None and (found := _WAIT.fullmatch(name)):
                wait_s = min(int(found[1]), int(max_wait_s))
    return Preference(respond_async, wait_s)


def query_number(request: web.Request, name: str) -> float | None:
    """A number of the query string, at least 0. Raises `ApiError`."""
    text = request.query.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text, re.ASCII):
        raise ApiError("invalid_request", "It must be a number and at least 0.", param=name)
    return float(text)
