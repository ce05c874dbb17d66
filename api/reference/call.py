"""What the reference says of one method of one path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter

JSON: Final = "application/json"
FORM: Final = "multipart/form-data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One method of one path."""

    tag: str
    summary: str
    #: Schemas of the body and of the query; None where there is none.
    body: TypeAdapter[Any] | None = None
    query: TypeAdapter[Any] | None = None
    #: The body's media type.
    media: str = JSON
    #: The body may be left out.
    body_optional: bool = False
    #: Status of each success, and what it brings: a model, a media type, or None for nothing.
    answers: Mapping[int, type[BaseModel] | str | None] = field(default_factory=dict)
    #: A successful answer may be a stream of events instead.
    streams: bool = False
    #: Headers of the request that mean something.
    headers: tuple[str, ...] = ()
    #: A body that works on the models that come with Forebay, ids apart.
    example: Mapping[str, Any] | None = None
