"""From bytes to a checked request in one pass, from pydantic's complaints to one clear error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from api.errors import ApiError
from api.schemas.formats import TAGS
from api.schemas.inference import TEXTS, TOKENS
from api.schemas.jobs import ENDPOINTS
from api.schemas.responses import ENDPOINT as RESPONSES
from api.schemas.responses import ID, ITEMS, REFERENCE, TEXT

T = TypeVar("T")

#: More problems than this in one body are not worth telling apart.
_MAX_PROBLEMS: Final = 100
#: Longest `param` shown; names of unknown parameters are the caller's own words.
_MAX_PARAM: Final = 128
_PATHS: Final = (*ENDPOINTS, RESPONSES)
#: Names that pydantic puts into a location for members of a union.
_UNION_MEMBERS: Final = frozenset({TEXTS, TOKENS, TEXT, ITEMS, ID, REFERENCE, *_PATHS, *TAGS})


def parse(adapter: TypeAdapter[T], raw: bytes) -> T:
    """Validate a JSON body. Raises `ApiError` naming the parameter at fault, never its value."""
    try:
        # The adapter's own method adds nothing but a frame.
        request: T = adapter.validator.validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from None
    # A NUL can only come as an escape; it has no meaning in text and ends strings elsewhere. Read
    # by the same parser again: others refuse what this one has let pass (NaN).
    if b"\\u0000" in raw and (path := _find_nul(from_json(raw), ())) is not None:
        raise ApiError("invalid_request", "NUL characters are not allowed.", param=_param(path))
    return request


def parse_query(adapter: TypeAdapter[T], query: Mapping[str, str]) -> T:
    """The same for a query string."""
    try:
        return adapter.validate_strings(dict(query))
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> ApiError:
    """What to answer to it, naming the parameter at fault."""
    if error.error_count() > _MAX_PROBLEMS:
        return ApiError("invalid_request", f"The body has more than {_MAX_PROBLEMS} problems.")
    problem = error.errors(include_url=False, include_input=False)[0]
    kind, param = problem["type"], _param(problem["loc"])
    if kind == "json_invalid":
        where = problem.get("ctx", {}).get("error", "")
        return ApiError("invalid_request", f"The body is not valid JSON: {where}.")
    if kind == "extra_forbidden":
        return ApiError("unsupported_parameter", "This parameter is not supported.", param=param)
    if kind == "unsupported_value":
        return ApiError("unsupported_parameter", _sentence(problem["msg"]), param=param)
    if kind == "missing":
        return ApiError("invalid_request", f"Missing required parameter: {param}.", param=param)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        allowed = ", ".join(_PATHS)
        message = f"endpoint is required and one of {allowed}."
        return ApiError("invalid_request", message, param="endpoint")
    if param is None and kind in ("model_type", "model_attributes_type"):
        return ApiError("invalid_request", "The body must be a JSON object.")
    return ApiError("invalid_request", _sentence(problem["msg"]), param=param)


def _path(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The place in the body, without pydantic's own names for the members of unions."""
    parts = tuple(part for part in loc if part not in _UNION_MEMBERS)
    # A key of `metadata` is content.
    return parts[: parts.index("metadata") + 1] if "metadata" in parts else parts


def _param(loc: Sequence[int | str]) -> str | None:
    parts = [str(part) for part in _path(loc)]
    return readable(".".join(parts)) or None


def readable(name: str) -> str:
    """A name the caller made up, fit to be shown."""
    name = name[:_MAX_PARAM]
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:] + ("" if message.endswith(".") else ".")


def _find_nul(value: Any, path: tuple[int | str, ...]) -> tuple[int | str, ...] | None:
    if isinstance(value, str):
        return path if "\0" in value else None
    if isinstance(value, dict):
        for key, entry in value.items():
            if "\0" in key:
                return path
            if (found := _find_nul(entry, (*path, key))) is not None:
                return found
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            if (found := _find_nul(entry, (*path, index))) is not None:
                return found
    return None
