"""`GET /v1/usage`: what a tenant used, by hour and model; its own unless an operator asks."""

from __future__ import annotations

import orjson
from aiohttp import web

from api import keys
from api.errors import ApiError
from api.schemas.parsing import parse_query
from api.schemas.usage import USAGE, usage_page


async def fetch(request: web.Request) -> web.Response:
    wanted = parse_query(USAGE, request.query)
    principal = request[keys.PRINCIPAL]
    tenant = wanted.tenant or principal.tenant
    # Whether there is such a tenant makes no difference.
    if tenant != principal.tenant and not principal.has("admin"):
        message = "Another tenant's usage needs a key with the scope admin."
        raise ApiError("insufficient_scope", message, param="tenant")
    found = await request.app[keys.QUEUE].usage(tenant, hours=wanted.hours, model=wanted.model)
    return web.Response(body=orjson.dumps(usage_page(found)), content_type="application/json")
