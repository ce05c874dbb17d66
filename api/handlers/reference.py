"""`/openapi.json`, and `/docs` to read and try it; all files come from here."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

import orjson
from aiohttp import hdrs, web

from api.errors import ApiError

_TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "start.js": "text/javascript",
}
#: Scripts and requests of this origin only; images are those inside the style sheet.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE: Final = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}


@cache
def _document() -> bytes:
    # The table of routes imports the handlers.
    from api.reference.document import openapi
    from api.routes import ROUTES

    return orjson.dumps(openapi(ROUTES))


@cache
def _file(name: str) -> bytes:
    return (resources.files("api.reference") / "assets" / name).read_bytes()


async def document(_: web.Request) -> web.Response:
    """`GET /openapi.json`."""
    headers = {hdrs.CACHE_CONTROL: "no-cache"}
    return web.Response(body=_document(), content_type="application/json", headers=headers)


async def page(_: web.Request) -> web.Response:
    """`GET /docs`."""
    return web.Response(
        body=_file("index.html"), content_type="text/html", charset="utf-8", headers=_SAFE
    )


async def asset(request: web.Request) -> web.Response:
    """`GET /docs/{asset}`."""
    name = request.match_info["asset"]
    if name not in _TYPES:
        raise ApiError("not_found")
    headers = {**_SAFE, hdrs.CACHE_CONTROL: "max-age=86400"}
    return web.Response(
        body=_file(name), content_type=_TYPES[name], charset="utf-8", headers=headers
    )
