"""Prometheus metrics of the API, and gauges of the queue read at scrape time.

With `PROMETHEUS_MULTIPROC_DIR` set, a scrape shows the sum over all processes that write there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from api.ports import Queue
from broker.errors import BrokerError
from broker.jobs import Band
from broker.stats import QueueStats, WorkerStatus

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: From an answer out of memory to a whole generation.
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One API process's own counters. Labels are bounded: routes, statuses, models, bands."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._requests = Histogram(
            "forebay_api_request_duration_seconds",
            "Time from a request's head to the end of its answer",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._submitted = Counter(
            "forebay_api_jobs_submitted_total",
            "Jobs accepted into the queue",
            ("model", "endpoint", "band"),
            registry=self.registry,
        )
        self._refused = Counter(
            "forebay_api_requests_refused_total",
            "Requests that were answered with an error, by its code",
            ("code",),
            registry=self.registry,
        )
        self._authentication_failures = Counter(
            "forebay_api_authentication_failures_total",
            "Credentials refused, by reason",
            ("reason",),
            registry=self.registry,
        )
        self._batches = Counter(
            "forebay_api_batches_total",
            "Batches that ended, by their status",
            ("status",),
            registry=self.registry,
        )
        self._batch_lines = Counter(
            "forebay_api_batch_lines_total",
            "Lines of batches whose result was collected",
            ("endpoint", "outcome"),
            registry=self.registry,
        )
        self._file_bytes = Counter(
            "forebay_api_file_bytes_total",
            "Bytes of files that were taken in (in) and handed out (out)",
            ("direction",),
            registry=self.registry,
        )
        # `labels()` costs more than what it finds.
        self._observers: dict[tuple[str, str, int], Histogram] = {}
        self._submissions: dict[tuple[str, str, Band], Counter] = {}

    def request_served(self, method: str, route: str, status: int, seconds: float) -> None:
        key = (method, route, status)
        observer = self._observers.get(key)
        if observer is None:
            observer = self._observers[key] = self._requests.labels(method, route, str(status))
        observer.observe(seconds)

    def job_submitted(self, model: str, endpoint: str, band: Band) -> None:
        key = (model, endpoint, band)
        counter = self._submissions.get(key)
        if counter is None:
            counter = self._submissions[key] = self._submitted.labels(model, endpoint, band.value)
        counter.inc()

    def request_refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def authentication_failed(self, reason: str) -> None:
        self._authentication_failures.labels(reason).inc()

    def batch_ended(self, status: str) -> None:
        self._batches.labels(status).inc()

    def batch_line_collected(self, endpoint: str, *, completed: bool) -> None:
        self._batch_lines.labels(endpoint, "completed" if completed else "failed").inc()

    def file_bytes(self, direction: str, count: int) -> None:
        self._file_bytes.labels(direction).inc(count)

    async def render(self, queue: Queue, models: Sequence[str]) -> bytes:
        """The whole exposition. Queue gauges are left out while the queue can't be reached."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        gauges = CollectorRegistry()
        gauges.register(await _read_gauges(queue, models))
        return generate_latest(registry) + generate_latest(gauges)


async def _read_gauges(queue: Queue, models: Sequence[str]) -> Collector:
    try:
        workers = await queue.workers()
        stats = await asyncio.gather(*(queue.stats(model, top=0) for model in models))
    except BrokerError:
        return _Gauges((_gauge("forebay_broker_up", "The queue answers", (), [((), 0)]),))
    return _Gauges(_families(stats, workers))


class _Gauges(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _families(
    stats: Sequence[QueueStats], workers: Sequence[WorkerStatus]
) -> Iterator[GaugeMetricFamily]:
    bands = [(one.queue, band) for one in stats for band in one.bands]
    yield _gauge("forebay_broker_up", "The queue answers", (), [((), 1)])
    yield _gauge(
        "forebay_broker_queue_depth_jobs",
        "Jobs waiting",
        ("model", "band"),
        [((model, band.band.value), band.depth) for model, band in bands],
    )
    yield _gauge(
        "forebay_broker_queue_oldest_seconds",
        "Age of the oldest waiting job",
        ("model", "band"),
        [((model, band.band.value), band.oldest_ms / 1000) for model, band in bands],
    )
    for name, help_, values in (
        ("in_flight", "Jobs leased to workers", [one.in_flight for one in stats]),
        ("delayed", "Jobs that wait for their time", [one.delayed for one in stats]),
        ("dead", "Dead letters", [one.dead for one in stats]),
    ):
        rows = [((one.queue,), value) for one, value in zip(stats, values, strict=True)]
        yield _gauge(f"forebay_broker_{name}_jobs", help_, ("model",), rows)
    ready = {one.queue: 0 for one in stats}
    for worker in workers:
        if worker.state == "ready" and worker.queue in ready:
            ready[worker.queue] += 1
    yield _gauge(
        "forebay_broker_ready_workers",
        "Workers that take jobs",
        ("model",),
        [((model,), count) for model, count in ready.items()],
    )


def _gauge(
    name: str,
    help_: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family
