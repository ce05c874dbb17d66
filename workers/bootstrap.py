"""Puts a worker process together: settings in, engine loaded and warm, Celery consuming.

Nothing here imports torch before threads and devices are pinned; with the simulated engine torch is
never imported.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable

import redis

from broker.app import make_app
from broker.cancels import CancelListener
from broker.connections import connect
from broker.leases import LeaseRegistry
from broker.leases import install as install_registry
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from broker.tickets import TicketIssuer, TicketOffice
from config.catalogue import ModelSpec
from config.logs import get_logger
from config.settings import Settings
from workers import tasks
from workers.engine import Engine
from workers.metrics import WorkerMetrics
from workers.pinning import unbind
from workers.publisher import DeltaPublisher
from workers.runner import Runner
from workers.turns import Turns

log = get_logger(__name__)


def make_engine(
    settings: Settings,
    spec: ModelSpec,
    *,
    on_step: Callable[[int], None] | None = None,
    on_lost: Callable[[], None] | None = None,
    on_dead: Callable[[], None] | None = None,
    on_kernel: Callable[[str], None] | None = None,
) -> Engine:
    """The engine of a model, not started yet.

    `on_step` gets the requests of each step, `on_lost` is called when the engine was lost,
    `on_dead` when it can't be rebuilt; `on_kernel` gets what computes a chat model's steps.
    """
    if settings.worker.engine == "simulated":
        from workers.engines.simulated import SimulatedEngine

        return SimulatedEngine(spec, settings.simulated, on_step=on_step)
    from workers.sources import ensure

    folder = ensure(spec, settings.models)
    if spec.kind == "embedding":
        from workers.engines.embedding import EmbeddingEngine

        return EmbeddingEngine(
            spec,
            folder,
            threads=settings.worker.threads,
            stall_s=settings.worker.stall_s,
            on_step=on_step,
            on_lost=on_lost,
            on_dead=on_dead,
        )
    from workers.engines.continuous import ContinuousEngine

    return ContinuousEngine(
        spec,
        folder,
        threads=settings.worker.threads,
        stall_s=settings.worker.stall_s,
        step_ms=settings.worker.max_step_ms,
        kernel=settings.worker.kernel,
        models=settings.models,
        on_step=on_step,
        on_lost=on_lost,
        on_dead=on_dead,
        on_kernel=on_kernel,
    )


class WorkerProcess:
    """One Celery worker with one model; `run` returns its exit code."""

    def __init__(self, settings: Settings, spec: ModelSpec, *, name: str) -> None:
        self._settings = settings
        self._spec = spec
        self._name = name
        self._hostname = socket.gethostname()
        self._owner = f"{self._hostname}:{os.getpid()}:{secrets.token_hex(4)}"
        self._started_ms = time.time_ns() // 1_000_000
        self._state = "loading"
        self._engine: Engine | None = None
        self._dead = False

    def run(self) -> int:
        settings, spec = self._settings, self._spec
        label = "simulated" if settings.worker.engine == "simulated" else "transformers"
        metrics = WorkerMetrics(spec.name, label)
        serve_metrics(settings)
        client = connect(settings.redis)
        queue = RedisQueue(client, settings.queue)
        registry = LeaseRegistry(
            queue,
            queue_name=spec.name,
            owner=self._owner,
            ttl_s=settings.queue.lease_ttl_s,
            renew_every_s=settings.queue.renew_every_s,
            status=self._status,
            healthy=self._healthy,
            grace_s=settings.worker.grace_s,
            batch_slots=self._batch_slots,
        )
        install_registry(registry)
        registry.start()
        cancels = CancelListener(client, spec.name, registry.note_cancel)
        cancels.start()
        publisher = DeltaPublisher(
            queue, spec.name, interval_s=settings.worker.flush_interval_ms / 1000
        )
        publisher.start()
        issuer: TicketIssuer | None = None
        try:
            begun = time.monotonic()
            engine = make_engine(
                settings,
                spec,
                on_step=metrics.step,
                on_lost=metrics.engine_lost,
                on_dead=self._engine_dead,
                on_kernel=metrics.kernel,
            )
            self._engine = engine
            unbind()
            engine.start()
            runner = Runner(
                engine=engine,
                registry=registry,
                queue=queue,
                publisher=publisher,
                metrics=metrics,
            )
            if settings.queue.broker_url.get_secret_value():
                tasks.install(runner, Turns(registry, runner, metrics))
                issuer = self._issue_tickets(client, queue, metrics)
            else:
                tasks.install(runner)
            self._state = "ready"
            registry.announce()
            log.info(
                "worker_ready",
                model=spec.name,
                engine=engine.name,
                capacity=engine.capacity,
                load_s=round(time.monotonic() - begun, 2),
            )
            self._consume()
        finally:
            if issuer is not None:
                issuer.stop()
            publisher.stop()
            registry.stop()
            cancels.stop()
            if self._engine is not None:
                self._engine.stop()
        log.info("worker_stopped", model=spec.name)
        return 1 if self._dead else 0

    def _issue_tickets(
        self, client: redis.Redis, queue: RedisQueue, metrics: WorkerMetrics
    ) -> TicketIssuer:
        model = self._spec.name
        office = TicketOffice(self._settings.queue, model)
        issuer = TicketIssuer(office, client, queue, model, metrics.tickets_issued)
        issuer.start()
        return issuer

    def _consume(self) -> None:
        """Hand over to Celery until it is told to stop; it drains the registry by itself."""
        from celery.signals import setup_logging

        def keep_our_logging(**_: object) -> None:
            """Connected so that Celery leaves the logging of this process alone."""

        setup_logging.connect(keep_our_logging, weak=False)
        app = make_app(self._settings, model_queues=[self._spec.name])
        app.set_current()
        worker = app.Worker(
            hostname=f"{self._name}@{self._hostname}",
            concurrency=self._engine.capacity if self._engine else 1,
            queues=list(app.amqp.queues),
            task_events=self._settings.worker.task_events,
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        worker.start()

    def _engine_dead(self) -> None:
        """The engine is gone for good: leave, so that the process is started afresh."""
        self._dead = True
        log.critical("engine_dead", model=self._spec.name)
        os.kill(os.getpid(), signal.SIGTERM)

    def _batch_slots(self) -> int:
        capacity = self._engine.capacity if self._engine else 1
        return max(1, int(capacity * self._settings.queue.batch_slots))

    def _healthy(self) -> bool:
        return self._engine is None or self._state == "loading" or self._engine.alive

    def _status(self) -> WorkerStatus:
        engine = self._engine
        simulated = self._settings.worker.engine == "simulated"
        return WorkerStatus(
            owner=self._owner,
            queue=self._spec.name,
            hostname=self._hostname,
            pid=os.getpid(),
            engine="simulated" if simulated else "transformers",
            state=self._state,
            capacity=engine.capacity if engine else self._spec.max_batch,
            jobs=0,  # the registry knows
            steps=engine.steps if engine else 0,
            started_ms=self._started_ms,
            seen_ms=time.time_ns() // 1_000_000,
        )


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
