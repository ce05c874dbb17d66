"""Browsers of other origins, where a setting lets them in; off, nothing of this runs.

Credentials travel in `Authorization`, never in cookies, so no origin gets more than its key gives.
"""

from __future__ import annotations

from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

#: What a page may read of an answer beside its body.
_EXPOSED: Final = ", ".join(
    (
        "x-request-id", "x-job-id", "x-priority", "x-queue-ms", "x-overhead-ms", "Retry-After",
        "retry-after-ms", "Location", "ETag", "Idempotent-Replayed", "Preference-Applied",
        "RateLimit", "RateLimit-Policy",
    )
)  # fmt: skip
_METHODS: Final = "GET, POST, DELETE, PATCH, OPTIONS"
#: Seconds for which a browser need not ask again.
_MAX_AGE_S: Final = "600"


def install(app: web.Application, origins: tuple[str, ...]) -> None:
    """Let pages of these origins (`https://app.example`, or `*`) call the API."""
    anyone = "*" in origins

    def allowed(request: web.BaseRequest) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not (anyone or origin in origins):
            return None
        return "*" if anyone else origin

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        if not anyone:
            response.headers[hdrs.VARY] = hdrs.ORIGIN
        if (origin := allowed(request)) is not None:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or wanted is None or allowed(request) is None:
            return await handler(request)
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S,
        }
        # `*` would leave out Authorization.
        if (names := request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)) is not None:
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = names
        return web.Response(status=204, headers=headers)

    app.on_response_prepare.append(mark)
    app.middlewares.append(preflight)
