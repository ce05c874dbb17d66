"""The one middleware: request id, authentication, errors, metrics and the access log.

One and not five, because every layer costs each request a call and a frame.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from structlog.contextvars import bind_contextvars

from api import keys
from api.auth.errors import AuthenticationError, AuthenticationUnavailableError
from api.errors import ApiError, from_aiohttp, from_broker, render
from api.metrics import Metrics
from api.routes import PUBLIC, Route
from broker.errors import BrokerError
from config.logs import get_logger

log = get_logger(__name__)
_stdlib_log: Final = logging.getLogger(__name__)

#: Ids only have to differ, and this asks the kernel once, not for each.
_IDS: Final = Random(os.urandom(32))  # noqa: S311
_REQUEST_ID: Final = "x-request-id"
#: An incoming id that is safe to repeat in headers, logs and records.
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
#: Label of requests that no route matched, or whose method nobody has heard of.
_OTHER: Final = "other"
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
#: Status in metrics and logs of a request whose caller left before the answer (nginx's number).
_CLIENT_GONE: Final = 499


def make_guard(table: Mapping[web.AbstractRoute, Route]) -> Middleware:
    """The middleware for a table of routes, as `add_routes` returns it."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        request_id = request_id_of(request)
        request[keys.REQUEST_ID] = request_id
        route = table.get(request.match_info.route)
        metrics = request.app[keys.METRICS]
        status = _CLIENT_GONE
        try:
            try:
                # What no route matches has nothing to protect: aiohttp's own handler says 404.
                if route is not None and route.scope is not PUBLIC:
                    _authenticate(request, route.scope, request_id)
                response = await handler(request)
            except (asyncio.CancelledError, ConnectionError):
                raise
            except Exception as error:
                response = _answer(error, request, request_id, metrics)
                if request.writer.output_size:
                    status = response.status
                    # A second head in the middle of an answer would be read as part of it.
                    raise ConnectionAbortedError("the answer was broken off") from error
            status = response.status
        finally:
            path = _OTHER if route is None else route.path
            method = request.method if request.method in _METHODS else _OTHER
            seconds = time.perf_counter() - started
            metrics.request_served(method, path, status, seconds)
            # Probes come by the second; that one is answered "not ready" isn't news each time.
            if status >= 400 and not (route is not None and route.scope is PUBLIC):
                event = "request_refused" if status < 500 else "request_failed"
                _log_access(log.info, event, method, path, status, seconds)
            elif _stdlib_log.isEnabledFor(logging.DEBUG):
                # Asked first: a line that is only dropped later still costs as much as the parsing.
                _log_access(log.debug, "request_served", method, path, status, seconds)
        if not response.prepared:
            finish(response, request_id)
        return response

    return guard


def _log_access(
    write: Callable[..., object], event: str, method: str, route: str, status: int, seconds: float
) -> None:
    """The route, not the path: what callers put into a path is theirs."""
    duration_ms = round(seconds * 1000, 1)
    write(event, method=method, route=route, status=status, duration_ms=duration_ms)


def finish(response: web.StreamResponse, request_id: str) -> None:
    """The headers of every answer."""
    response.headers[_REQUEST_ID] = request_id
    # What runs here is nobody's business.
    response.headers[hdrs.SERVER] = "forebay"


def request_id_of(request: web.BaseRequest) -> str:
    """The caller's own id where it is sane, else a new one."""
    given = request.headers.get(_REQUEST_ID)
    if given is not None and _SANE_ID.fullmatch(given):
        return given
    return f"req_{_IDS.getrandbits(96):024x}"


def _authenticate(request: web.Request, scope: str, request_id: str) -> None:
    principal = request.app[keys.AUTHENTICATOR].authenticate(
        request.headers.get(hdrs.AUTHORIZATION)
    )
    # The handler runs in a task of its own; nothing has to be unbound after it.
    bind_contextvars(request_id=request_id, tenant=principal.tenant)
    if scope not in principal.scopes:
        raise ApiError("insufficient_scope", f"This call needs a key with the scope {scope}.")
    request[keys.PRINCIPAL] = principal


def _unauthenticated(error: AuthenticationError, request: web.Request, request_id: str) -> ApiError:
    """401, or 429 for whoever fails too often; those are counted, no longer logged."""
    authorization = request.headers.get(hdrs.AUTHORIZATION)
    wait_s = 0.0
    if authorization is not None:
        wait_s = request.app[keys.LOGIN_FAILURES].add(request.remote, authorization)
    if wait_s:
        return ApiError("authentication_limited", retry_after_s=wait_s)
    log.info(
        "authentication_failed",
        request_id=request_id,
        reason=error.reason,
        key_id=error.key_id,
        remote=request.remote,
    )
    return ApiError("invalid_api_key")


def _answer(
    error: Exception, request: web.Request, request_id: str, metrics: Metrics
) -> web.Response:
    """Any exception as a response; this is the only place that decides what a caller learns."""
    if isinstance(error, ApiError):
        shown = error
    elif isinstance(error, AuthenticationError):
        metrics.authentication_failed(error.reason)
        shown = _unauthenticated(error, request, request_id)
    elif isinstance(error, AuthenticationUnavailableError):
        shown = ApiError("accounts_unavailable")
    elif isinstance(error, BrokerError):
        shown = from_broker(error)
        if shown.status == 500:
            log.error("broker_failed", request_id=request_id, exc_info=error)
    elif isinstance(error, web.HTTPException):
        shown = from_aiohttp(error)
    else:
        log.error("request_crashed", request_id=request_id, exc_info=error)
        shown = ApiError("internal_error")
    metrics.request_refused(shown.code)
    return render(shown, request, request_id)
