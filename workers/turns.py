"""What becomes of a ticket in a worker: a claim, and the job that it brings."""

from __future__ import annotations

import threading
from typing import Protocol

from broker.errors import BrokerUnavailableError
from broker.jobs import Claim
from broker.leases import LeaseRegistry
from broker.transport_messages import delivery_tag
from config.logs import get_logger
from workers.metrics import WorkerMetrics

log = get_logger(__name__)

#: Pause between two looks whether this worker may claim again (s).
RETRY_S = 0.25

#: Ticket -> the job it has brought, while that runs. Of the whole process, as Celery makes the
#: requests that look here.
jobs: dict[str, str] = {}


class JobRunner(Protocol):
    def run(self, job_id: str) -> None: ...


class Turns:
    """Takes tickets in the threads of the pool, one job each.

    A ticket is acknowledged only when its job is through, and RabbitMQ hands out no more tickets
    than there are threads: a busy worker keeps none from an idle one. A worker that can't claim now
    (Redis is away, its engine stands still) keeps the tickets it has, so that they don't go round
    and round; others get new ones.
    """

    def __init__(self, registry: LeaseRegistry, runner: JobRunner, metrics: WorkerMetrics) -> None:
        self._registry = registry
        self._runner = runner
        self._metrics = metrics
        self._claiming = threading.Lock()

    def take(self, ticket: str) -> str | None:
        """Claim a job and run it; returns its id, or None when there was nothing to claim."""
        claim = self._claim()
        self._metrics.ticket_taken(found=claim is not None)
        if claim is None:
            return None
        job_id = claim.job.id
        jobs[ticket] = job_id
        try:
            self._runner.run(job_id)
        finally:
            del jobs[ticket]
            # Nothing is left of a job that was settled; one that wasn't goes back.
            self._registry.acknowledge(delivery_tag(claim))
        return job_id

    def _claim(self) -> Claim | None:
        registry = self._registry
        said = False
        while not registry.draining:
            if registry.accepting:
                try:
                    claim = self._claim_one()
                except BrokerUnavailableError as error:
                    if not said:
                        said = True
                        log.debug("claim_delayed", reason=str(error))
                else:
                    return claim
            registry.drain_begun.wait(RETRY_S)
        return None

    def _claim_one(self) -> Claim | None:
        registry = self._registry
        # The room that one thread has seen isn't given away by another.
        with self._claiming:
            if registry.draining:
                return None
            claims = registry.queue.claim(
                registry.queue_name, registry.owner, limit=1, batch_room=registry.batch_room()
            )
            return next(iter(registry.add(claims)), None)
