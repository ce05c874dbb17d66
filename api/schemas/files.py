"""Fields of an upload, the query of a listing, and a file as its owner sees it."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, WithJsonSchema

from api.accounts.files import StoredFile
from api.schemas.fields import Schema

#: Longest name kept, in characters.
MAX_NAME: Final = 255
#: OpenAI's bounds: an hour to 30 days.
_Lifetime = Annotated[int, Field(ge=3600, le=2_592_000, strict=False)]
#: Files of one page; a larger `limit` is answered with as many.
MAX_PAGE: Final = 1_000
#: Characters that are a way out of a folder, or of a header's quotes.
_UNSAFE: Final = re.compile(r'[/\\"<>|:*?]')


class UploadForm(Schema):
    """The fields beside the file. `batch_output` is made by batches alone."""

    purpose: Literal["batch", "user_data"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    lifetime_s: Annotated[_Lifetime | None, Field(alias="expires_after[seconds]")] = None


class UploadBody(UploadForm):
    """The whole form, for the reference: the file is read as it comes."""

    file: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]


class FileListing(Schema):
    """Query of `GET /v1/files`."""

    purpose: Literal["batch", "batch_output", "user_data"] | None = None
    after: Annotated[str, Field(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=10_000, strict=False)] = MAX_PAGE
    order: Literal["asc", "desc"] = "desc"


class ExpiresAfter(Schema):
    """`expires_after` of a JSON body."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


UPLOAD_FORM = TypeAdapter(UploadForm)
UPLOAD_BODY = TypeAdapter(UploadBody)
FILE_LISTING = TypeAdapter(FileListing)


def safe_name(given: str | None) -> str:
    """A name to be shown and saved by: no folders, no control characters, never empty."""
    name = unicodedata.normalize("NFC", (given or "").replace("\\", "/").rpartition("/")[2])
    # Format characters can turn the order of a name's letters around.
    name = "".join(c for c in name if unicodedata.category(c)[0] not in "CZ" or c == " ")
    name = _UNSAFE.sub("_", name).strip(" .")
    if len(name) > MAX_NAME:
        stem, dot, ending = name.rpartition(".")
        keeps = dot and len(ending) <= 16
        name = stem[: MAX_NAME - len(ending) - 1] + dot + ending if keeps else name[:MAX_NAME]
    return name or "file"


def file_object(file: StoredFile) -> dict[str, Any]:
    """For `orjson.dumps`; OpenAI's shape."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": int(file.expires_at.timestamp()) if file.expires_at else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def page_object(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page of a list as OpenAI's clients walk it."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }
