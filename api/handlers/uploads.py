"""Reading an upload: a multipart form whose file goes to disk as it comes, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import BodyPartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import ValidationError

from api import keys
from api.accounts.files import QuotaError
from api.errors import ApiError
from api.files.library import Draft, Library, TooLargeError
from api.schemas.files import UPLOAD_FORM, UploadForm
from api.schemas.parsing import refusal

#: Read from the connection, and written to the disk, at once.
_CHUNK: Final = 256 * 1024
#: Bytes of a form beside its file: boundaries, headers, fields.
FORM_BYTES: Final = 64 * 1024
_MAX_FIELD: Final = 1024
_MAX_PARTS: Final = 16
_FIELDS: Final = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
#: Encodings of a part that change nothing.
_PLAIN: Final = frozenset({"", "7bit", "8bit", "binary", "identity"})


@asynccontextmanager
async def received(
    request: web.Request, library: Library, tenant: str
) -> AsyncIterator[tuple[Draft, str | None, UploadForm]]:
    """The written file, the name its sender gave it, and the other fields. Raises `ApiError`."""
    _check_head(request, library)
    async with library.draft(tenant) as draft:
        try:
            async with asyncio.timeout(library.settings.upload_timeout_s):
                name, fields = await _read(request, draft)
        except TimeoutError:
            raise ApiError("request_timeout") from None
        except TooLargeError:
            raise too_large(library) from None
        except QuotaError:
            raise quota_exceeded(library) from None
        except (ValueError, HttpProcessingError):
            # aiohttp's reader: what isn't a form, or ends in the middle.
            raise ApiError("invalid_request", "The multipart form is not valid.") from None
        try:
            form = UPLOAD_FORM.validate_python(fields)
        except ValidationError as error:
            raise refusal(error) from None
        if (form.anchor is None) != (form.lifetime_s is None):
            raise ApiError(
                "invalid_request", "It needs both anchor and seconds.", param="expires_after"
            )
        yield draft, name, form


def too_large(library: Library) -> ApiError:
    limit = library.settings.max_bytes
    return ApiError("payload_too_large", f"A file may have at most {limit} bytes.", param="file")


def quota_exceeded(library: Library) -> ApiError:
    limit = library.settings.quota_bytes
    return ApiError("storage_quota_exceeded", f"Your files may have at most {limit} bytes in all.")


def _check_head(request: web.Request, library: Library) -> None:
    if (request.content_length or 0) > library.settings.max_bytes + FORM_BYTES:
        raise too_large(library)
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise ApiError("unsupported_media_type", "Compressed bodies are not supported.")
    if request.content_type != "multipart/form-data":
        raise ApiError("unsupported_media_type", "The body must be multipart/form-data.")


async def _read(request: web.Request, draft: Draft) -> tuple[str | None, dict[str, str]]:
    idle_s = request.app[keys.SETTINGS].api.read_timeout_s
    reader = await request.multipart()
    fields: dict[str, str] = {}
    name: str | None = None
    found = False
    for _ in range(_MAX_PARTS):
        async with asyncio.timeout(idle_s):
            part = await reader.next()
        if part is None:
            if not found:
                raise ApiError("invalid_request", "Missing required parameter: file.", param="file")
            return name, fields
        if not isinstance(part, BodyPartReader):
            raise ApiError("invalid_request", "The multipart form is not valid.")
        encoding = part.headers.get(hdrs.CONTENT_TRANSFER_ENCODING, "").lower()
        if encoding not in _PLAIN or part.headers.get(hdrs.CONTENT_ENCODING, "") not in _PLAIN:
            raise ApiError("unsupported_media_type", "Parts must not be encoded.")
        if part.name == "file":
            if found:
                raise ApiError("invalid_request", "There may be one file only.", param="file")
            found, name = True, part.filename
            while data := await _chunk(part, idle_s):
                await draft.write(data)
        elif part.name in _FIELDS and part.name not in fields:
            fields[part.name] = await _field(part, idle_s)
        else:
            raise ApiError("unsupported_parameter", "The form has a field that is not supported.")
    raise ApiError("invalid_request", f"The form has more than {_MAX_PARTS} parts.")


async def _field(part: BodyPartReader, idle_s: float) -> str:
    data = b""
    while chunk := await _chunk(part, idle_s):
        data += chunk
        if len(data) > _MAX_FIELD:
            raise ApiError("invalid_request", "The value is too long.", param=part.name)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ApiError("invalid_request", "The value is not UTF-8.", param=part.name) from None


async def _chunk(part: BodyPartReader, idle_s: float) -> bytes:
    """What has come, up to `_CHUNK`; empty at the end of the part."""
    async with asyncio.timeout(idle_s):
        while not part.at_eof():
            # May be empty where a boundary lies across two reads.
            if data := await part.read_chunk(_CHUNK):
                return data
    return b""
