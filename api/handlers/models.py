"""`GET /v1/models`: the catalogue in OpenAI's shape."""

from __future__ import annotations

import time
from typing import Any, Final

import orjson
from aiohttp import web

from api import keys
from api.errors import ApiError
from config.catalogue import ModelSpec

#: The catalogue has no dates; a model is as old as the process that serves it.
_CREATED: Final = int(time.time())


async def listing(request: web.Request) -> web.Response:
    models = [_shown(spec) for spec in request.app[keys.CATALOGUE].values()]
    body = orjson.dumps({"object": "list", "data": models})
    return web.Response(body=body, content_type="application/json")


async def fetch(request: web.Request) -> web.Response:
    spec = request.app[keys.CATALOGUE].get(request.match_info["model"])
    if spec is None:
        raise ApiError("model_not_found", param="model")
    return web.Response(body=orjson.dumps(_shown(spec)), content_type="application/json")


def _shown(spec: ModelSpec) -> dict[str, Any]:
    return {
        "id": spec.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "forebay",
        "kind": spec.kind,
        "endpoints": spec.endpoints,
        "context_tokens": spec.context_tokens,
        "max_output_tokens": spec.output_limit if spec.kind == "chat" else None,
        "description": spec.description,
    }
