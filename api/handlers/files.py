"""`/v1/files`: what batches read and write, and what users keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import orjson
from aiohttp import hdrs, web

from api import keys
from api.accounts.errors import AccountsError
from api.accounts.files import FileInUseError, QuotaError, StoredFile, UnknownCursorError
from api.errors import ApiError
from api.files.ids import new_file_id
from api.files.library import FileStoreError, Library, StorageFullError
from api.files.store import ObjectMissingError
from api.handlers.body import ask_for
from api.handlers.uploads import FORM_BYTES, quota_exceeded, received
from api.schemas.files import FILE_LISTING, MAX_PAGE, file_object, page_object, safe_name
from api.schemas.parsing import parse_query
from config.logs import get_logger

log = get_logger(__name__)

#: Read from the disk, and sent, at once.
_CHUNK: Final = 256 * 1024


async def upload(request: web.Request) -> web.Response:
    """`POST /v1/files`."""
    tenant = request[keys.PRINCIPAL].tenant
    async with (
        storage(request) as library,
        received(request, library, tenant) as (
            draft,
            name,
            form,
        ),
    ):
        now = datetime.now(UTC)
        lifetime = timedelta(seconds=form.lifetime_s) if form.lifetime_s else None
        file = StoredFile(
            id=new_file_id(),
            tenant=tenant,
            filename=safe_name(name),
            purpose=form.purpose,
            bytes=draft.bytes,
            created_at=now,
            expires_at=now + lifetime if lifetime else None,
        )
        await library.keep(draft, file)
    request.app[keys.METRICS].file_bytes("in", file.bytes)
    log.info("file_stored", file_id=file.id, purpose=file.purpose, bytes=file.bytes)
    return json(file_object(file))


async def expect_upload(request: web.Request) -> None:
    """`Expect: 100-continue`: a file that is too large isn't asked for."""
    await ask_for(request, request.app[keys.SETTINGS].files.max_bytes + FORM_BYTES)


async def listing(request: web.Request) -> web.Response:
    """`GET /v1/files`."""
    wanted = parse_query(FILE_LISTING, request.query)
    tenant = request[keys.PRINCIPAL].tenant
    async with storage(request) as library:
        files, more = await library.sql(
            lambda: library.records.page(
                tenant,
                now=datetime.now(UTC),
                purpose=wanted.purpose,
                after=wanted.after,
                limit=min(wanted.limit, MAX_PAGE),
                newest_first=wanted.order == "desc",
            )
        )
    return json(page_object([file_object(file) for file in files], more=more))


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/files/{id}`."""
    async with storage(request) as library:
        return json(file_object(await _find(request, library)))


async def delete(request: web.Request) -> web.Response:
    """`DELETE /v1/files/{id}`."""
    file_id = request.match_info["file_id"]
    async with storage(request) as library:
        if not await library.remove(file_id, request[keys.PRINCIPAL].tenant):
            raise ApiError("file_not_found")
    log.info("file_deleted", file_id=file_id)
    return json({"id": file_id, "object": "file", "deleted": True})


async def content(request: web.Request) -> web.StreamResponse:
    """`GET /v1/files/{id}/content`, whole or one range of it."""
    async with storage(request) as library:
        file = await _find(request, library)
        opened = await asyncio.to_thread(library.store.open, file.id)
    try:
        first, last = _range(request, file.bytes)
        response = web.StreamResponse(status=200, headers=_content_headers(file))
        response.content_length = last - first
        if hdrs.RANGE in request.headers:
            response.set_status(206)
            response.headers[hdrs.CONTENT_RANGE] = f"bytes {first}-{last - 1}/{file.bytes}"
        response.headers["x-request-id"] = request[keys.REQUEST_ID]
        await response.prepare(request)
        await _send(response, opened, first, last)
        await response.write_eof()
        request.app[keys.METRICS].file_bytes("out", last - first)
        return response
    finally:
        opened.close()


@asynccontextmanager
async def storage(request: web.Request) -> AsyncIterator[Library]:
    """The library; what goes wrong in it becomes an `ApiError`."""
    library = request.app.get(keys.LIBRARY)
    if library is None:
        raise ApiError("storage_unavailable")
    try:
        yield library
    except QuotaError:
        raise quota_exceeded(library) from None
    except FileInUseError:
        raise ApiError("file_in_use") from None
    except UnknownCursorError:
        raise ApiError("invalid_request", "There is no such id.", param="after") from None
    except StorageFullError:
        log.error("storage_full")
        raise ApiError("storage_full") from None
    except ObjectMissingError:
        log.error("file_content_missing")
        raise ApiError("file_not_found") from None
    except (FileStoreError, AccountsError) as error:
        log.error("storage_unavailable", why=type(error).__name__)
        raise ApiError("storage_unavailable") from None


def json(document: Any) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")


async def _find(request: web.Request, library: Library) -> StoredFile:
    file = await library.get(request.match_info["file_id"], request[keys.PRINCIPAL].tenant)
    if file is None:
        raise ApiError("file_not_found")
    return file


def _range(request: web.Request, size: int) -> tuple[int, int]:
    """First byte to send and the one after the last."""
    try:
        wanted = request.http_range
    except ValueError:
        raise _no_range(size) from None
    first, last, _ = wanted.indices(size)
    if hdrs.RANGE in request.headers and first >= last:
        raise _no_range(size)
    return first, last


def _no_range(size: int) -> ApiError:
    return ApiError("range_not_satisfiable", headers={hdrs.CONTENT_RANGE: f"bytes */{size}"})


def _content_headers(file: StoredFile) -> dict[str, str]:
    """Never shown by a browser as a page of ours."""
    return {
        hdrs.CONTENT_TYPE: "application/octet-stream",
        hdrs.CONTENT_DISPOSITION: f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        hdrs.ACCEPT_RANGES: "bytes",
        "X-Content-Type-Options": "nosniff",
    }


async def _send(response: web.StreamResponse, opened: BinaryIO, first: int, last: int) -> None:
    def piece(at: int) -> bytes:
        opened.seek(at)
        return opened.read(min(_CHUNK, last - at))

    at = first
    while at < last:
        data = await asyncio.to_thread(piece, at)
        if not data:
            # Cut short on the disk: the connection says so by ending early.
            raise ConnectionAbortedError("the file is shorter than it was")
        await response.write(data)
        at += len(data)
