"""Answers to what aiohttp's parser refuses, in the shape of all others.

It never reaches the application; aiohttp would quote the line at fault and name its own version.
"""

from __future__ import annotations

from aiohttp import web

from api.errors import ApiError, render
from api.middlewares.guard import finish, request_id_of


class ApiRunner(web.AppRunner):
    """Runs an application on connections that keep to our error shape."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if isinstance(resp, web.Response):
            # The connection keeps its last answer until the next one: for as long as it is idle,
            # or waits on a long poll or a stream.
            resp.body = None
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # Logs it, and refuses when a part of some answer is out.
        super().handle_error(request, status, exc, message)
        if status == 400:
            error = ApiError("invalid_request", "The request is not valid HTTP.")
        else:
            error = ApiError("internal_error")
        request_id = request_id_of(request)
        response = render(error, request, request_id)
        finish(response, request_id)
        response.force_close()
        return response
