"""`forebay workers start`: from settings to running workers, and from signals to their end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from api.cli.fleet.keeper import WHO, Fleet
from api.cli.fleet.metrics import FleetMetrics, serve
from api.cli.fleet.placement import Place
from api.cli.merged_log import MergedLog
from api.cli.plan import child_environment
from broker.connections import connect
from broker.redis_queue import RedisQueue
from config.logs import get_logger
from config.settings import Settings, SettingsError

log = get_logger(__name__)

#: Signals this close together are one request; see `api.cli.up`.
_ONE_REQUEST_S = 0.5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class PlainLog(MergedLog):
    """Lines as the workers wrote them, for what reads JSON; the launcher's own are events too."""

    def _prefix(self, name: str) -> bytes:
        return b""

    def say(self, name: str, line: str | bytes) -> None:
        if name == WHO and isinstance(line, str):
            log.info("launcher_reported", detail=line)
        else:
            super().say(name, line)


def run(settings: Settings, places: Sequence[Place], replan: Callable[[], list[Place]]) -> int:
    """Run until told to stop; returns the exit code. `replan` makes the places anew for a swap."""
    readable = settings.log.format == "console" or (
        settings.log.format == "auto" and sys.stderr.isatty()
    )
    merged = MergedLog() if readable else PlainLog()
    if readable:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(merged.stream(WHO))
    try:
        with tempfile.TemporaryDirectory(prefix="forebay-metrics-") as folder:
            return asyncio.run(_run(settings, places, replan, merged, Path(folder)))
    finally:
        merged.close()


async def _run(
    settings: Settings,
    places: Sequence[Place],
    replan: Callable[[], list[Place]],
    merged: MergedLog,
    folder: Path,
) -> int:
    registry = CollectorRegistry()
    metrics = FleetMetrics(registry)
    # Before anything is started: a busy port ends the launcher, not its workers.
    serve(settings, registry, folder)
    environment = {
        # A data folder's settings are in no environment yet.
        "FOREBAY_REDIS__URL": settings.redis.url.get_secret_value(),
        "FOREBAY_MODELS__CATALOGUE": settings.models.catalogue,
        "FOREBAY_MODELS__CACHE_DIR": settings.models.cache_dir,
        "FOREBAY_WORKER__ENGINE": settings.worker.engine,
        # One listener shows the metrics of all.
        "FOREBAY_WORKER__METRICS_PORT": "0",
        "PROMETHEUS_MULTIPROC_DIR": str(folder),
    }
    if not isinstance(merged, PlainLog):
        environment["FOREBAY_LOG__FORMAT"] = "console"
    signals = _Signals()
    with connect(settings.redis) as client:
        fleet = Fleet(
            settings,
            RedisQueue(client, settings.queue),
            environment=child_environment(environment),
            log=merged,
            metrics=metrics,
            metrics_folder=folder,
        )
        fleet.start(places)
        watching = asyncio.create_task(fleet.watch())
        swapping = asyncio.create_task(_swap_on_demand(fleet, signals.swap, replan, merged))
        stopping = asyncio.create_task(signals.stop.wait())
        try:
            await asyncio.wait([watching, swapping, stopping], return_when=asyncio.FIRST_COMPLETED)
            merged.say(WHO, "draining (again to kill)")
        finally:
            for task in (watching, swapping, stopping):
                task.cancel()
            await _end(fleet, signals.hurry, merged)
            # A task that ended by itself has something to say.
            for task in (watching, swapping):
                with suppress(asyncio.CancelledError):
                    await task
            signals.ignore()
    return 0


async def _end(fleet: Fleet, hurry: asyncio.Event, merged: MergedLog) -> None:
    """Drain the workers; once more asked, kill them."""
    draining = asyncio.create_task(fleet.stop())
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if hurry.is_set() and not draining.done():
        merged.say(WHO, "killing everything; its jobs go back to the queue")
        await fleet.kill()
    await draining
    hurrying.cancel()
    merged.say(WHO, "stopped")


async def _swap_on_demand(
    fleet: Fleet, wanted: asyncio.Event, replan: Callable[[], list[Place]], merged: MergedLog
) -> None:
    while True:
        await wanted.wait()
        wanted.clear()
        try:
            places = await asyncio.to_thread(replan)
        except SettingsError as error:
            merged.say(WHO, f"nothing is replaced: {error}")
            continue
        merged.say(WHO, "replacing the workers, one after another")
        well = await fleet.swap(places)
        merged.say(WHO, "all replaced" if well else "not all could be replaced")


class _Signals:
    """SIGTERM, SIGINT or SIGHUP: stop; once more: at once. SIGUSR1: replace the workers."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.swap = asyncio.Event()
        self._asked_at = 0.0
        loop = asyncio.get_running_loop()
        # Under nohup a hang-up is ignored, and stays so.
        self._handled = [n for n in _STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        for number in self._handled:
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGUSR1, self.swap.set)

    def ignore(self) -> None:
        """All is done: a late signal shall not turn that into a failure."""
        loop = asyncio.get_running_loop()
        for number in (*self._handled, signal.SIGUSR1):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _stop(self) -> None:
        now = time.monotonic()
        if not self.stop.is_set():
            self._asked_at = now
            self.stop.set()
        elif now - self._asked_at >= _ONE_REQUEST_S:
            self.hurry.set()
