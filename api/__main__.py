"""`python -m api`: one API process, configured by the environment alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

import uvloop
from aiohttp import web

from api.app import make_app, make_metrics_app
from api.auth.authenticator import peppers
from broker.connections import check_server, connect
from broker.errors import BrokerError, BrokerUnavailableError
from config import catalogue, logs, settings
from config.catalogue import ModelSpec
from config.settings import Settings, SettingsError

log = logs.get_logger(__name__)

#: Set by whoever starts several processes on one port; the first one also serves metrics.
PROCESS_INDEX: Final = "FOREBAY_PROCESS_INDEX"


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
        _check_broker(tree)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(tree, models))
    except (StartError, BrokerError, SettingsError) as error:
        return _refuse(error, 1)
    return 0


async def serve(tree: Settings, models: Mapping[str, ModelSpec]) -> None:
    """Run until a signal comes, then let open requests finish. Raises `StartError`."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # aiohttp waits this long twice: for handlers to end, then for them to notice their end.
    grace_s = tree.api.shutdown_grace_s / 2
    app = make_app(tree, models)
    main_runner = web.AppRunner(app, shutdown_timeout=grace_s)
    metrics_runner: web.AppRunner | None = None
    await main_runner.setup()
    try:
        await _listen(main_runner, tree.api.host, tree.api.port, shared=tree.api.processes > 1)
        if tree.api.metrics_port and os.environ.get(PROCESS_INDEX, "0") == "0":
            metrics_runner = web.AppRunner(make_metrics_app(app), shutdown_timeout=0.5)
            await metrics_runner.setup()
            await _listen(metrics_runner, tree.api.metrics_host, tree.api.metrics_port)
        log.info("api_started", addresses=[address[:2] for address in main_runner.addresses])
        await stop.wait()
        log.info("api_stopping", grace_s=tree.api.shutdown_grace_s)
    finally:
        if metrics_runner is not None:
            await metrics_runner.cleanup()
        await main_runner.cleanup()
    log.info("api_stopped")


async def _listen(runner: web.AppRunner, host: str, port: int, *, shared: bool = False) -> None:
    site = web.TCPSite(runner, host, port, reuse_port=True if shared else None, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StartError(f"can't listen on {host}:{port}: {reason.lower()}") from None


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
