"""What a worker counts. Labels are bounded: model, engine, band, status, code; never a tenant."""

from __future__ import annotations

import time
from functools import lru_cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from broker.jobs import Job, Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_REQUESTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


class WorkerMetrics:
    """The metrics of one worker process; `engine` says `simulated` where no model runs."""

    def __init__(self, model: str, engine: str, registry: CollectorRegistry = REGISTRY) -> None:
        # Finding a labelled child costs more than counting on it; there are few, so they are kept.
        self._child = lru_cache(maxsize=1024)(
            lambda metric, *labels: metric.labels(model, engine, *labels)
        )
        common = ("model", "engine")
        self._jobs = Counter(
            "forebay_workers_jobs_total",
            "Attempts ended, by the state they left the job in.",
            (*common, "band", "status", "code"),
            registry=registry,
        )
        self._wait = Histogram(
            "forebay_workers_job_wait_seconds",
            "From submission to the start of an attempt.",
            (*common, "band"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "forebay_workers_first_token_seconds",
            "From submission to the first text of a streamed job.",
            (*common, "band"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._run = Histogram(
            "forebay_workers_job_run_seconds",
            "From the start of an attempt to its end.",
            (*common, "band"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "forebay_workers_tokens_total",
            "Tokens of finished jobs; cached ones are also counted as input.",
            (*common, "kind"),
            registry=registry,
        )
        self._batch = Histogram(
            "forebay_workers_batch_requests",
            "Requests in an engine step.",
            common,
            buckets=_REQUESTS,
            registry=registry,
        ).labels(model, engine)
        self._running = Gauge(
            "forebay_workers_running_jobs",
            "Jobs this worker runs now.",
            common,
            multiprocess_mode="livesum",
            registry=registry,
        ).labels(model, engine)
        self._lost = Counter(
            "forebay_workers_leases_lost_total",
            "Attempts whose lease was lost while they ran; their results were dropped.",
            common,
            registry=registry,
        ).labels(model, engine)
        self._engine_lost = Counter(
            "forebay_workers_engine_losses_total",
            "Times the engine died or stood still.",
            common,
            registry=registry,
        ).labels(model, engine)

        self._kernel = Gauge(
            "forebay_workers_kernel_info",
            "1 for what computes a chat model's steps: reference, torch, avx512 or avx512bf16.",
            (*common, "kernel"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._answers = Counter(
            "forebay_workers_answers_total",
            "Answers that may be kept: computed, kept from before, or shared with one under way.",
            (*common, "source"),
            registry=registry,
        )
        self._tickets = Counter(
            "forebay_workers_tickets_taken_total",
            "Tickets from RabbitMQ, by whether there was a job to claim.",
            (*common, "found"),
            registry=registry,
        )
        self._issued = Counter(
            "forebay_workers_tickets_issued_total",
            "Tickets put into RabbitMQ.",
            common,
            registry=registry,
        ).labels(model, engine)

    def answered(self, source: str) -> None:
        self._child(self._answers, source).inc()

    def ticket_taken(self, *, found: bool) -> None:
        self._child(self._tickets, "job" if found else "nothing").inc()

    def tickets_issued(self, count: int) -> None:
        self._issued.inc(count)

    def job_started(self, job: Job) -> None:
        self._running.inc()
        waited = max(0, job.started_ms - job.created_ms) / 1000
        self._child(self._wait, job.band.value).observe(waited)

    def first_text(self, job: Job) -> None:
        seconds = max(0.0, time.time() - job.created_ms / 1000)
        self._child(self._first, job.band.value).observe(seconds)

    def job_ended(self, job: Job, status: str, code: str, run_s: float, usage: Usage) -> None:
        """Count an attempt; `status` is also `requeued` or `lost`."""
        self._running.dec()
        self._child(self._jobs, job.band.value, status, code).inc()
        self._child(self._run, job.band.value).observe(run_s)
        for kind, count in (
            ("input", usage.input_tokens),
            ("output", usage.output_tokens),
            ("cached", usage.cached_tokens),
        ):
            if count:
                self._child(self._tokens, kind).inc(count)

    def lease_lost(self) -> None:
        self._lost.inc()

    def kernel(self, name: str) -> None:
        """What computes the steps, known once the engine has started."""
        self._child(self._kernel, name).set(1)

    def engine_lost(self) -> None:
        self._engine_lost.inc()

    def step(self, requests: int) -> None:
        self._batch.observe(requests)
