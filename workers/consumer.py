"""Celery's consumer, with a quicker and quieter way back to a broker that was away."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker import consumer
from celery.worker.state import maybe_shutdown

from broker import leases
from config.logs import get_logger

log = get_logger(__name__)

#: Pauses between attempts to connect grow from the first by the second up to the third (s).
RETRY_S = (0.2, 0.2, 1.0)

#: A connection that is lost within this time was never any good (s).
SETTLED_S = 2.0


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery waits up to 30 s between attempts, and logs each of them."""

    #: When the connection was lost last (monotonic).
    _lost_at = -math.inf

    def ensure_connected(self, conn: Any) -> Any:
        said = False

        def failed(error: Exception, _interval: float) -> None:
            nonlocal said
            if not said:
                said = True
                log.warning("broker_unreachable", broker=conn.as_uri(), error=str(error))

        first, step, most = RETRY_S
        conn = conn.ensure_connection(
            failed,
            None,
            interval_start=first,
            interval_step=step,
            interval_max=most,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        registry = leases.installed()
        if registry is not None and registry.on_drain is None:
            registry.on_drain = lambda: hub.call_soon(_woken)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        if not self._wait_quietly():
            log.warning("broker_refuses", error=str(exc))

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        if not self._wait_quietly():
            with warnings.catch_warnings():
                # About jobs that run on through the loss, which is what we want.
                warnings.simplefilter("ignore", CPendingDeprecationWarning)
                super().on_connection_error_after_connected(exc)

    def _wait_quietly(self) -> bool:
        """Whether it is still the outage that was told of; pauses, and drops the connection."""
        again = monotonic() - self._lost_at < SETTLED_S
        if again:
            # It lets us connect and refuses what comes then, as a read-only Redis does.
            with suppress(Exception):
                self.connection.collect()
            sleep(RETRY_S[-1])
        self._lost_at = monotonic()
        return again


def _woken() -> None:
    """Runs in the event loop so that it looks at its flags."""
