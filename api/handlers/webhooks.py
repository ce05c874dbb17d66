"""Webhook endpoints of the caller's tenant, and what was delivered to them."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import orjson
from aiohttp import web

from api import keys
from api.accounts.errors import DatabaseUnavailableError, UnknownAccountError
from api.accounts.webhook_service import JOBS, WebhookService
from api.accounts.webhooks import TooManyEndpointsError
from api.errors import ApiError
from api.handlers.body import read_body
from api.schemas.parsing import parse, parse_query
from api.schemas.webhooks import (
    DELIVERY_PAGE,
    ENDPOINT_CHANGE,
    ENDPOINT_PAGE,
    ENDPOINT_TEST,
    NEW_ENDPOINT,
    ROTATION,
    EndpointTest,
    Rotation,
    delivery_object,
    endpoint_object,
)
from broker.webhooks.endpoints import EVENT_TYPES, TEST_EVENT
from broker.webhooks.urls import UrlError, check_url
from config.logs import get_logger
from config.settings import Settings

log = get_logger(__name__)

T = TypeVar("T")

_ENDPOINT_ID: Final = re.compile(r"wep_[0-9a-hjkmnp-tv-z]{20}", re.ASCII)
_DELIVERY_ID: Final = re.compile(r"whd_[0-9a-f]{26}", re.ASCII)


def accept_url(settings: Settings, url: str, *, param: str) -> str:
    """The URL if webhooks may go there. Raises `ApiError`."""
    development = settings.env == "development"
    try:
        check_url(url, plain=development, loopback=development and settings.webhooks.allow_loopback)
    except UrlError as error:
        message = str(error)
        raise ApiError(
            "invalid_request", f"{message[:1].upper()}{message[1:]}.", param=param
        ) from None
    return url


async def create(request: web.Request) -> web.Response:
    """`POST /v1/webhook_endpoints`: the only time its secret is shown."""
    wanted = parse(NEW_ENDPOINT, await read_body(request))
    made, secret = await _known(
        _service(request).create(
            _tenant(request),
            url=accept_url(request.app[keys.SETTINGS], wanted.url, param="url"),
            event_types=tuple(dict.fromkeys(wanted.event_types)),
            name=wanted.name,
            include_output=wanted.include_output,
        )
    )
    log.info("webhook_endpoint_created", endpoint_id=made.id, key_id=_key_id(request))
    return _json({**endpoint_object(made), "signing_secret": secret})


async def event_types(request: web.Request) -> web.Response:
    """`GET /v1/webhook_event_types`: what an endpoint may ask for."""
    return _json({"object": "list", "data": list(EVENT_TYPES)})


async def listing(request: web.Request) -> web.Response:
    """`GET /v1/webhook_endpoints`."""
    wanted = parse_query(ENDPOINT_PAGE, request.query)
    found = await _known(_service(request).list_all(_tenant(request)))
    ids = [stored.id for stored, _ in found]
    if wanted.after:
        if wanted.after not in ids:
            raise ApiError("invalid_request", "It must be the id of an endpoint.", param="after")
        found = found[ids.index(wanted.after) + 1 :]
    page = found[: wanted.limit]
    return _page([endpoint_object(*each) for each in page], len(found) > wanted.limit)


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/webhook_endpoints/{id}`."""
    found = await _known(_service(request).get(_tenant(request), _endpoint_id(request)))
    return _json(endpoint_object(*found))


async def change(request: web.Request) -> web.Response:
    """`POST` or `PATCH /v1/webhook_endpoints/{id}`."""
    endpoint_id = _endpoint_id(request)
    wanted = parse(ENDPOINT_CHANGE, await read_body(request))
    fields = wanted.model_dump(exclude_none=True)
    if wanted.url is not None:
        accept_url(request.app[keys.SETTINGS], wanted.url, param="url")
    if wanted.event_types is not None:
        fields["event_types"] = tuple(dict.fromkeys(wanted.event_types))
    found = await _known(_service(request).change(_tenant(request), endpoint_id, **fields))
    log.info("webhook_endpoint_changed", endpoint_id=endpoint_id, key_id=_key_id(request))
    return _json(endpoint_object(*found))


async def delete(request: web.Request) -> web.Response:
    """`DELETE /v1/webhook_endpoints/{id}`."""
    endpoint_id = _endpoint_id(request)
    await _known(_service(request).delete(_tenant(request), endpoint_id))
    log.info("webhook_endpoint_deleted", endpoint_id=endpoint_id, key_id=_key_id(request))
    return _json({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})


async def rotate(request: web.Request) -> web.Response:
    """`POST /v1/webhook_endpoints/{id}/rotate_secret`; the id `jobs` is that of single jobs."""
    jobs = request.match_info["endpoint_id"] == JOBS
    endpoint_id = JOBS if jobs else _endpoint_id(request)
    raw = await read_body(request)
    overlap_s = (parse(ROTATION, raw) if raw else Rotation()).overlap_s
    service, tenant = _service(request), _tenant(request)
    shown: dict[str, Any]
    if jobs:
        secret = await _known(service.rotate_jobs(tenant, overlap_s=overlap_s))
        shown = {"id": JOBS, "object": "webhook_endpoint"}
    else:
        made, secret = await _known(service.rotate(tenant, endpoint_id, overlap_s=overlap_s))
        shown = endpoint_object(made)
    log.info("webhook_secret_rotated", endpoint_id=endpoint_id, key_id=_key_id(request))
    return _json({**shown, "signing_secret": secret})


async def test(request: web.Request) -> web.Response:
    """`POST /v1/webhook_endpoints/{id}/test`: sends a message and tells how it was answered."""
    endpoint_id = _endpoint_id(request)
    raw = await read_body(request)
    wanted = parse(ENDPOINT_TEST, raw) if raw else EndpointTest()
    event_type = wanted.event_type or TEST_EVENT
    delivery = await _known(_service(request).test(_tenant(request), endpoint_id, event_type))
    last = delivery.tries[-1] if delivery is not None and delivery.tries else None
    return _json(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint_id,
            "event_type": event_type,
            "success": delivery is not None and delivery.state == "delivered",
            "status_code": last.status or None if last is not None else None,
            "error": last.error or None if last is not None else "not_sent_yet",
            "delivery_id": delivery.id if delivery is not None else None,
        }
    )


async def deliveries(request: web.Request) -> web.Response:
    """`GET /v1/webhook_endpoints/{id}/deliveries`; the id `jobs` is that of single jobs."""
    jobs = request.match_info["endpoint_id"] == JOBS
    endpoint_id = JOBS if jobs else _endpoint_id(request)
    wanted = parse_query(DELIVERY_PAGE, request.query)
    found, more = await _known(
        _service(request).deliveries(
            _tenant(request),
            endpoint_id,
            after=wanted.after,
            limit=wanted.limit,
            state=wanted.state,
        )
    )
    return _page([delivery_object(each) for each in found], more)


async def redeliver(request: web.Request) -> web.Response:
    """`POST /v1/webhook_deliveries/{id}/redeliver`."""
    delivery_id = request.match_info["delivery_id"]
    found = None
    if _DELIVERY_ID.fullmatch(delivery_id):
        found = await _known(_service(request).redeliver(_tenant(request), delivery_id))
    if found is None:
        raise ApiError("not_found", "There is no such delivery.")
    log.info("webhook_redelivered", delivery_id=delivery_id, key_id=_key_id(request))
    return _json(delivery_object(found), status=202)


async def _known(call: Awaitable[T]) -> T:
    """What a call returns; its failures as `ApiError`."""
    try:
        return await call
    except UnknownAccountError:
        raise _no_endpoint() from None
    except TooManyEndpointsError as error:
        raise ApiError("invalid_request", f"No more endpoints: {error}.") from None
    except DatabaseUnavailableError:
        raise ApiError("accounts_unavailable") from None


def _no_endpoint() -> ApiError:
    return ApiError("not_found", "There is no such webhook endpoint.")


def _endpoint_id(request: web.Request) -> str:
    """The id in the path. One that can't exist is answered like one that doesn't."""
    endpoint_id = request.match_info["endpoint_id"]
    if not _ENDPOINT_ID.fullmatch(endpoint_id):
        raise _no_endpoint()
    return endpoint_id


def _service(request: web.Request) -> WebhookService:
    service = request.app.get(keys.WEBHOOKS)
    if service is None:
        raise ApiError("accounts_unavailable")
    return service


def _tenant(request: web.Request) -> str:
    return request[keys.PRINCIPAL].tenant


def _key_id(request: web.Request) -> str:
    return request[keys.PRINCIPAL].key_id


def _page(data: list[dict[str, Any]], more: bool) -> web.Response:
    return _json(
        {
            "object": "list",
            "data": data,
            "has_more": more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def _json(document: Any, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(document), content_type="application/json")
