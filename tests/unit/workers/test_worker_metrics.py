"""What is counted, under which labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from broker.jobs import Band, NewJob, Usage
from broker.memory import MemoryQueue
from config.settings import Queue
from workers.metrics import WorkerMetrics


def test_a_job_from_start_to_end() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics("m", "simulated", registry)
    now = [1_000]
    queue = MemoryQueue(Queue(), lambda: now[0])
    queue.enqueue(NewJob(tenant="t", model="m", endpoint="/v1/embeddings", body=b"{}"))
    now[0] += 250
    job = queue.claim("m", "w")[0].job
    labels = {"model": "m", "engine": "simulated"}
    band = {"band": Band.INTERACTIVE.value}

    metrics.job_started(job)
    assert registry.get_sample_value("forebay_workers_running_jobs", labels) == 1
    metrics.job_ended(job, "completed", "", 0.5, Usage(input_tokens=7, output_tokens=3))
    metrics.step(4)

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"forebay_workers_{name}", labels | more)

    assert value("running_jobs") == 0
    assert value("jobs_total", status="completed", code="", **band) == 1
    assert value("job_wait_seconds_sum", **band) == 0.25
    assert value("job_run_seconds_sum", **band) == 0.5
    assert value("tokens_total", kind="input") == 7
    assert value("tokens_total", kind="output") == 3
    assert value("tokens_total", kind="cached") is None
    assert value("batch_requests_sum") == 4
    everything = {
        name for family in registry.collect() for s in family.samples for name in s.labels
    }
    assert everything <= {"model", "engine", "band", "status", "code", "kind", "le"}
