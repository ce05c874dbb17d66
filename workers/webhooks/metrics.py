"""What the webhook worker counts; no tenants, endpoints or addresses among the labels."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram


class WebhookMetrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._attempts = Counter(
            "forebay_workers_webhook_attempts_total",
            "Attempts to deliver a webhook, by what became of the delivery.",
            ("outcome",),
            registry=registry,
        )
        self._seconds = Histogram(
            "forebay_workers_webhook_attempt_seconds",
            "From the start of an attempt to the head of its answer, or its failure.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self._outbox = Gauge(
            "forebay_workers_webhook_outbox_events",
            "Events that aren't deliveries yet.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._lost = Gauge(
            "forebay_workers_webhook_lost_events",
            "Events and deliveries given up because a bound was reached, ever.",
            ("bound",),
            multiprocess_mode="livemax",
            registry=registry,
        )

    def attempt_ended(self, outcome: str, seconds: float | None) -> None:
        """`outcome`: delivered, retried, failed or stale."""
        self._attempts.labels(outcome).inc()
        if seconds is not None:
            self._seconds.observe(seconds)

    def backlog(self, counts: Mapping[str, int]) -> None:
        self._outbox.set(counts["outbox"])
        self._lost.labels("outbox").set(counts["overflowed"])
        self._lost.labels("endpoint").set(counts["discarded"])
