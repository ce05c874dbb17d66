"""A worker process's own listener for `/metrics`."""

from __future__ import annotations

import os

from config.settings import Settings


def serve_metrics(settings: Settings) -> None:
    """The process's own listener for `/metrics`, if it shall have one."""
    port = settings.worker.metrics_port
    if not port:
        return
    from prometheus_client import REGISTRY, CollectorRegistry, multiprocess, start_http_server

    registry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    start_http_server(port, addr=settings.worker.metrics_host, registry=registry)
