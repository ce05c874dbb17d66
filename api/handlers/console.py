"""`/console`: a page for a tenant with a key. It calls the API like any other client."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Final

from aiohttp import hdrs, web

from api.errors import ApiError

_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE: Final = "index.html"
#: Scripts, styles and requests of this origin only, nothing inline; and no script may turn a string
#: into markup, so that what jobs and receivers say can only ever be text.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for each time and mostly answered 304: all files are of one version after an upgrade.
    hdrs.CACHE_CONTROL: "no-cache",
}


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Content, type and entity tag by name: what isn't in here can't be asked for."""
    found = {}
    for file in (resources.files("api.console") / "assets").iterdir():
        kind = "text/html" if file.name == _PAGE else _TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            content = file.read_bytes()
            found[file.name] = (content, kind, hashlib.sha256(content).hexdigest()[:32])
    return found


async def page(request: web.Request) -> web.Response:
    """`GET /console`."""
    return _answer(request, _PAGE)


async def asset(request: web.Request) -> web.Response:
    """`GET /console/{asset}`."""
    name = request.match_info["asset"]
    if name == _PAGE or name not in _files():
        raise ApiError("not_found")
    return _answer(request, name)


def _answer(request: web.Request, name: str) -> web.Response:
    content, kind, tag = _files()[name]
    headers = {**_HEADERS, hdrs.ETAG: f'"{tag}"'}
    if any(each.value in (tag, "*") for each in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=content, content_type=kind, charset="utf-8", headers=headers)
