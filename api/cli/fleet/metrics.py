"""What the launcher of a machine's workers counts, and its listener for all of them."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, multiprocess, start_http_server

from config.settings import Settings


class FleetMetrics:
    """Beside the workers' own metrics, which come out of the folder they all write to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "forebay_fleet_worker_ends_total",
            "Worker processes that ended without being asked to, and were started again.",
            ("model",),
            registry=registry,
        )
        self.taken_out = Counter(
            "forebay_fleet_workers_taken_out_total",
            "Worker processes killed because they stood still or said nothing.",
            ("model", "reason"),
            registry=registry,
        )
        self.failing = Gauge(
            "forebay_fleet_failing_workers",
            "Workers that end again and again soon after their start.",
            ("model",),
            registry=registry,
        )
        self.swaps = Counter(
            "forebay_fleet_worker_swaps_total",
            "Workers replaced on request: done, or failed with the old one kept.",
            ("model", "outcome"),
            registry=registry,
        )


def serve(settings: Settings, registry: CollectorRegistry, folder: Path) -> None:
    """Answer `/metrics` with the sum of all workers and the launcher's own, if it shall."""
    if not settings.worker.metrics_port:
        return
    multiprocess.MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    start_http_server(
        settings.worker.metrics_port, addr=settings.worker.metrics_host, registry=registry
    )
