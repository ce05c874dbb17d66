"""The OpenAPI 3.1 document, made of the route table and the schemas that check requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Final

from pydantic import TypeAdapter

from api.errors import CODES
from api.reference.call import FORM, JSON, Call
from api.reference.calls import CALLS
from api.routes import PUBLIC, Route
from api.schemas import answers

_PROBLEM: Final = "application/problem+json"
_EVENTS: Final = "text/event-stream"
_REF: Final = "#/components/schemas/{model}"
_ERROR: Final = TypeAdapter(answers.ErrorObject)
_HEADERS: Final[Mapping[str, dict[str, Any]]] = {
    "Idempotency-Key": {
        "description": "For 24 hours the same key with the same body finds the same job.",
        "schema": {"type": "string", "pattern": "^[ -~]{1,255}$"},
    },
    "Prefer": {
        "description": "`wait=N` (s) or `respond-async`.",
        "schema": {"type": "string", "examples": ["wait=30"]},
    },
    "If-None-Match": {
        "description": "`ETag` of an earlier answer.",
        "schema": {"type": "string"},
    },
    "Range": {
        "description": "A part of the content, `bytes=0-1023`.",
        "schema": {"type": "string", "examples": ["bytes=0-1023"]},
    },
    "Last-Event-ID": {
        "description": "Number of the last event seen.",
        "schema": {"type": "string", "pattern": r"^\d{0,15}$"},
    },
}


def openapi(routes: Iterable[Route], calls: Mapping[str, Call] = CALLS) -> dict[str, Any]:
    """The document. Raises `KeyError` for a route that is not described."""
    routes = list(routes)
    described = {route: calls[f"{route.method} {route.path}"] for route in routes}
    schemas, components = _schemas(described.values())
    paths: dict[str, dict[str, Any]] = {}
    for route, call in described.items():
        operation = _operation(route, call, schemas)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Forebay",
            "version": version("forebay"),
            "description": (
                "Inference jobs in fair queues; OpenAI's calls and those for jobs. Every error has "
                "one of these codes: "
                + ", ".join(f"`{code}` ({CODES[code].status})" for code in CODES)
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": [{"name": name} for name in dict.fromkeys(c.tag for c in described.values())],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (`fb_…`) or an access token.",
                }
            },
        },
    }


def _schemas(calls: Iterable[Call]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Schemas by the identity of their adapter or model, and the components they refer to."""
    inputs: list[tuple[int, Any, TypeAdapter[Any]]] = [
        (id(answers.ErrorObject), "serialization", _ERROR)
    ]
    seen = {id(answers.ErrorObject)}
    for call in calls:
        for adapter in (None if call.media == FORM else call.body, call.query):
            if adapter is not None and id(adapter) not in seen:
                seen.add(id(adapter))
                inputs.append((id(adapter), "validation", adapter))
        for answer in call.answers.values():
            if isinstance(answer, type) and id(answer) not in seen:
                seen.add(id(answer))
                inputs.append((id(answer), "serialization", TypeAdapter(answer)))
    found, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    return {key: schema for (key, _), schema in found.items()}, definitions.get("$defs", {})


def _operation(route: Route, call: Call, schemas: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "tags": [call.tag],
        "summary": call.summary,
        "operationId": _name(route),
        "parameters": [*_in_path(route.path), *_in_query(call, schemas), *_in_headers(call)],
        "responses": _answers(call, schemas),
    }
    if route.scope == PUBLIC:
        shown["security"] = []
    else:
        shown["description"] = f"Needs a key with the scope `{route.scope}`."
    if call.body is not None:
        form = call.media == FORM
        content: dict[str, Any] = {
            "schema": _without_null(call.body) if form else schemas[id(call.body)]
        }
        if call.example is not None:
            content["example"] = dict(call.example)
        shown["requestBody"] = {
            "required": not call.body_optional,
            "content": {call.media: content},
        }
    return shown


def _name(route: Route) -> str:
    words = [word for word in re.split(r"[^a-z]+", route.path) if word not in ("", "v")]
    return "_".join([route.method.lower(), *words])


def _in_path(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _in_query(call: Call, schemas: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    if call.query is None:
        return []
    # Of its own, because a parameter is no reference to a whole query.
    schema = _without_null(call.query)
    wanted = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in wanted, "schema": each}
        for name, each in schema["properties"].items()
    ]


def _without_null(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    """The schema of a query or form, whose fields are given or not."""
    schema = adapter.json_schema(ref_template=_REF)
    definitions = schema.pop("$defs", {})
    resolved: dict[str, Any] = _resolved(schema, definitions)
    return resolved


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """With what it refers to put in its place, and without null."""
    if isinstance(schema, list):
        return [_resolved(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _resolved(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    shown = {name: _resolved(each, definitions) for name, each in schema.items() if name != "title"}
    if "anyOf" in shown:
        shown["anyOf"] = [each for each in shown["anyOf"] if each != {"type": "null"}]
        if shown.get("default", 0) is None:
            del shown["default"]
        if len(shown["anyOf"]) == 1:
            shown.update(shown.pop("anyOf")[0])
    return shown


def _in_headers(call: Call) -> list[dict[str, Any]]:
    return [{"name": name, "in": "header", **_HEADERS[name]} for name in call.headers]


def _answers(call: Call, schemas: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for status, answer in call.answers.items():
        content: dict[str, Any] = {}
        if isinstance(answer, str):
            content[answer] = {} if answer in (JSON, _EVENTS) else {"schema": {"type": "string"}}
        elif answer is not None:
            content[JSON] = {"schema": schemas[id(answer)]}
        if call.streams and status == 200:
            content[_EVENTS] = {}
        shown[str(status)] = {"description": _DESCRIPTIONS[status]}
        if content:
            shown[str(status)]["content"] = content
    problem = {"schema": {"type": "object"}}
    error = {"schema": schemas[id(answers.ErrorObject)]}
    shown["default"] = {"description": "Error", "content": {JSON: error, _PROBLEM: problem}}
    return shown


_DESCRIPTIONS: Final = {
    200: "Done",
    202: "Accepted; it goes on",
    204: "Nothing follows",
    206: "The part that was asked for",
    304: "Unchanged",
    503: "Not ready",
}
