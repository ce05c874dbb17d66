"""Figures of a demo, all taken from what its jobs really did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.cli.console import duration, percentile


@dataclass
class Run:
    """One job as its client saw it; times are `time.monotonic` seconds."""

    tenant: str
    submitted: float
    started: float | None = None
    first_text: float | None = None
    ended: float | None = None
    status: str = "queued"
    #: From the job object.
    queue_ms: float | None = None
    output_tokens: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.started is None or self.ended is None:
            return None
        return self.started, self.ended


def mean_batch(run: Run, others: Sequence[Run]) -> float | None:
    """Jobs that ran at the same time as this one (itself included), averaged over its time."""
    if run.interval is None:
        return None
    start, end = run.interval
    if end <= start:
        return 1.0
    shared = sum(
        max(0.0, min(end, other.interval[1]) - max(start, other.interval[0]))
        for other in others
        if other.interval is not None
    )
    return shared / (end - start)


def tenant_row(name: str, runs: Sequence[Run], everyone: Sequence[Run]) -> tuple[str, ...]:
    """Jobs, wait p50 and p95, time to first token, tokens/s, mean batch."""
    waits = [run.queue_ms for run in runs if run.queue_ms is not None]
    firsts = [(run.first_text - run.submitted) * 1000 for run in runs if run.first_text is not None]
    ends = [run.ended for run in runs if run.ended is not None]
    batches = [size for run in runs if (size := mean_batch(run, everyone)) is not None]
    span_s = max(ends) - min(run.submitted for run in runs) if ends else 0.0
    tokens = sum(run.output_tokens for run in runs)
    return (
        name,
        str(len(runs)),
        duration(percentile(waits, 0.5)),
        duration(percentile(waits, 0.95)),
        duration(percentile(firsts, 0.5)),
        f"{tokens / span_s:.1f}" if span_s > 0 else "-",
        f"{sum(batches) / len(batches):.1f}" if batches else "-",
    )


def batch_steps(metrics: str, model: str) -> tuple[float, float]:
    """Requests and steps so far, of `forebay_workers_batch_requests` in a Prometheus text."""
    total = steps = 0.0
    for line in metrics.splitlines():
        if line.startswith("forebay_workers_batch_requests_") and f'model="{model}"' in line:
            name, value = line.split("{", 1)[0], float(line.rsplit(" ", 1)[1])
            if name.endswith("_sum"):
                total += value
            elif name.endswith("_count"):
                steps += value
    return total, steps


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(left, right, strict=True))
    norms = math.sqrt(sum(a * a for a in left)) * math.sqrt(sum(b * b for b in right))
    return product / norms if norms else 0.0


def nearest(vectors: Sequence[Sequence[float]]) -> Mapping[int, tuple[int, float]]:
    """For each vector the index of the nearest other one and their cosine."""
    found: dict[int, tuple[int, float]] = {}
    for index, vector in enumerate(vectors):
        others = ((cosine(vector, other), n) for n, other in enumerate(vectors) if n != index)
        similarity, best = max(others)
        found[index] = (best, similarity)
    return found
