"""`python -m api`: one API process, configured by the environment alone."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import Final

import uvloop
from aiohttp import web

from api.app import make_app, make_metrics_app
from api.auth.authenticator import peppers
from api.protocol import ApiRunner
from broker.connections import check_server, connect
from broker.errors import BrokerError, BrokerUnavailableError
from config import catalogue, logs, settings
from config.catalogue import ModelSpec
from config.settings import Settings, SettingsError

log = logs.get_logger(__name__)

#: May be set by whoever starts several processes: then only the first, 0, serves the scraper.
#: Otherwise all do, on one port; with `PROMETHEUS_MULTIPROC_DIR` each shows the sum of all.
PROCESS_INDEX: Final = "FOREBAY_PROCESS_INDEX"
#: Connections the kernel holds before they are accepted (`net.core.somaxconn` at most); what comes
#: beyond is dropped and tries again after a second.
_BACKLOG: Final = 4096
#: Objects made, less those freed, between two looks for cycles.
_GC_THRESHOLD: Final = 10_000


class StartError(Exception):
    """The process can't start; the message is one line."""


def main() -> int:
    """Serve until SIGTERM or SIGINT. 2: the settings can't be used; 1: the start failed."""
    try:
        tree = settings.load()
        # Nobody could be told apart without one, in development neither.
        peppers(tree.auth)
        models = catalogue.load(tree.models.catalogue)
    except SettingsError as error:
        return _refuse(error, 2)
    logs.configure(tree.log, process="api")
    try:
        with ExitStack() as sockets:
            shared, write_s = tree.api.processes > 1, tree.api.write_timeout_s
            port = sockets.enter_context(
                bind(tree.api.host, tree.api.port, write_timeout_s=write_s, shared=shared)
            )
            metrics_port = None
            if tree.api.metrics_port and os.environ.get(PROCESS_INDEX, "0") == "0":
                address = tree.api.metrics_host, tree.api.metrics_port
                metrics_port = sockets.enter_context(
                    bind(*address, write_timeout_s=write_s, shared=shared)
                )
            _check_broker(tree)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(tree, models, port, metrics_port))
    except (StartError, BrokerError, SettingsError) as error:
        return _refuse(error, 1)
    return 0


async def serve(
    tree: Settings,
    models: Mapping[str, ModelSpec],
    port: socket.socket,
    metrics_port: socket.socket | None,
) -> None:
    """Serve on bound sockets until a signal comes, then let open requests finish."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app = make_app(tree, models)
    async with AsyncExitStack() as running:
        # aiohttp waits this long twice: for handlers to end, then for them to notice their end.
        runner = ApiRunner(app, shutdown_timeout=tree.api.shutdown_grace_s / 2)
        running.push_async_callback(runner.cleanup)
        await runner.setup()
        if metrics_port is not None:
            metrics_runner = ApiRunner(make_metrics_app(app), shutdown_timeout=0.5)
            running.push_async_callback(metrics_runner.cleanup)
            await metrics_runner.setup()
            await web.SockSite(metrics_runner, metrics_port).start()
        # What lives from the start is never garbage; the collector needn't look at it again.
        gc.collect()
        gc.freeze()
        # Requests leave few cycles behind, and looking for them took 5 % of the time at 700.
        gc.set_threshold(_GC_THRESHOLD)
        await web.SockSite(runner, port, backlog=_BACKLOG).start()
        log.info("api_started", address=port.getsockname()[:2], pid=os.getpid())
        await stop.wait()
        log.info("api_stopping", grace_s=tree.api.shutdown_grace_s)
    log.info("api_stopped")


def bind(host: str, port: int, *, write_timeout_s: float, shared: bool = False) -> socket.socket:
    """A socket bound to the address; several processes may share it. Raises `StartError`.

    Its connections break when their peer takes nothing for `write_timeout_s`, whoever writes.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Accepted connections inherit it; it holds for answers that are written already.
                limit_ms = round(write_timeout_s * 1000)
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
            bound.bind(address)
            if not shared:
                # Two processes may bind a port that neither listens on; only one may listen.
                # One of several listens when it is ready: the others serve until then.
                bound.listen(_BACKLOG)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise StartError(f"can't listen on {host}:{port}: {reason}") from None
    return bound


def _check_broker(tree: Settings) -> None:
    """Refuse a server that can never work; one that is away may come back."""
    with connect(tree.redis) as client:
        try:
            check_server(client)
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", reason=str(error))


def _refuse(error: Exception, code: int) -> int:
    sys.stderr.write(f"api: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
