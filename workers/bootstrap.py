"""Puts a worker process together: settings in, engine loaded and warm, Celery consuming.

Nothing here imports torch before threads and devices are pinned; with the simulated engine torch is
never imported.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import socket
import sys
import time

import redis

from broker.answers import RedisAnswers
from broker.app import make_app
from broker.cancels import CancelListener
from broker.connections import connect
from broker.leases import LeaseRegistry
from broker.leases import current as installed_registry
from broker.leases import install as install_registry
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from broker.ticket_issuer import TicketIssuer
from broker.tickets import TicketOffice
from config.catalogue import ModelSpec
from config.logs import get_logger
from config.settings import Settings
from workers import tasks
from workers.answering import AnswerDesk
from workers.device_metrics import DeviceMetrics
from workers.engine import Engine
from workers.engines.making import make_engine
from workers.identity import fingerprint
from workers.metrics import WorkerMetrics
from workers.metrics_listener import serve_metrics
from workers.pinning import place_of, unbind
from workers.publisher import DeltaPublisher
from workers.runner import Runner
from workers.turns import Turns

log = get_logger(__name__)

#: Objects made, less those freed, between two looks for cycles.
_GC_THRESHOLD = 10_000
#: Longest that a thread computes while another waits for the interpreter (s); Python's 5 ms is as
#: long as a job's whole way through the worker.
_SWITCH_S = 0.0005


class WorkerProcess:
    """One Celery worker with one model; `run` returns its exit code."""

    def __init__(self, settings: Settings, spec: ModelSpec, *, name: str) -> None:
        self._settings = settings
        self._spec = spec
        self._name = name
        self._hostname = socket.gethostname()
        self._owner = f"{self._hostname}:{os.getpid()}:{secrets.token_hex(4)}"
        self._started_ms = time.time_ns() // 1_000_000
        self._state = "fetching"
        simulated = settings.worker.engine == "simulated"
        self._engine_name = "simulated" if simulated else spec.engine
        self._place = settings.worker.place or place_of(os.environ)
        self._engine: Engine | None = None
        self._answers: AnswerDesk | None = None
        self._dead = False

    def run(self) -> int:
        settings, spec = self._settings, self._spec
        metrics = WorkerMetrics(spec.name, self._engine_name)
        serve_metrics(settings)
        client = connect(settings.redis)
        queue = RedisQueue(client, settings.queue)
        by_tickets = bool(settings.queue.broker_url.get_secret_value())
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
            slots=self._capacity if by_tickets else None,
        )
        install_registry(registry)
        registry.start()
        cancels = CancelListener(client, spec.name, registry.note_cancel)
        cancels.start()
        gauges = DeviceMetrics(os.environ.get("CUDA_VISIBLE_DEVICES"))
        gauges.start()
        publisher = DeltaPublisher(
            queue, spec.name, interval_s=settings.worker.flush_interval_ms / 1000
        )
        publisher.start()
        issuer: TicketIssuer | None = None
        answers: AnswerDesk | None = None
        try:
            begun = time.monotonic()
            engine = make_engine(
                settings,
                spec,
                on_stage=self._enter,
                on_step=metrics.step,
                on_lost=metrics.engine_lost,
                on_dead=self._engine_dead,
                on_kernel=metrics.kernel,
            )
            self._engine = engine
            unbind()
            engine.start()
            answers = self._answers = self._desk(client)
            runner = Runner(
                engine=engine,
                registry=registry,
                queue=queue,
                publisher=publisher,
                metrics=metrics,
                answers=answers,
            )
            if by_tickets:
                tasks.install(runner, Turns(registry, runner, metrics))
                issuer = self._issue_tickets(client, registry, metrics)
            else:
                tasks.install(runner)
            _settle_down()
            self._enter("ready")
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
            if answers is not None:
                answers.stop()
            publisher.stop()
            registry.stop()
            cancels.stop()
            gauges.stop()
            if self._engine is not None:
                self._engine.stop()
        log.info("worker_stopped", model=spec.name)
        return 1 if self._dead else 0

    def _desk(self, client: redis.Redis) -> AnswerDesk | None:
        """Where answers of this model are kept, if they are."""
        kept, spec = self._settings.answers, self._spec
        if not kept.ttl_s or not spec.keeps_answers:
            return None
        what = fingerprint(spec, self._settings)
        store = RedisAnswers(client, ttl_s=kept.ttl_s, most=kept.most)
        desk = AnswerDesk(store, spec, fingerprint=what, max_bytes=kept.max_bytes)
        desk.start()
        return desk

    def _issue_tickets(
        self, client: redis.Redis, registry: LeaseRegistry, metrics: WorkerMetrics
    ) -> TicketIssuer:
        office = TicketOffice(self._settings.queue, self._spec.name, self._owner)
        issuer = TicketIssuer(office, client, registry, metrics.tickets_issued)
        issuer.start()
        return issuer

    def _consume(self) -> None:
        """Hand over to Celery until it is told to stop; it drains the registry by itself."""
        from celery.signals import setup_logging

        def keep_our_logging(**_: object) -> None:
            """Connected so that Celery leaves the logging of this process alone."""

        setup_logging.connect(keep_our_logging, weak=False)
        app = make_app(self._settings, model_queues=[self._spec.name], owner=self._owner)
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

    def _enter(self, state: str) -> None:
        """Let everybody know how far the start has come."""
        self._state = state
        log.info("worker_stage_entered", model=self._spec.name, stage=state)
        installed_registry().announce()

    def _batch_slots(self) -> int:
        return max(1, int(self._capacity() * self._settings.queue.batch_slots))

    def _capacity(self) -> int:
        return self._engine.capacity if self._engine else 1

    def _healthy(self) -> bool:
        return self._engine is None or self._state != "ready" or self._engine.alive

    def _status(self) -> WorkerStatus:
        engine = self._engine
        return WorkerStatus(
            owner=self._owner,
            queue=self._spec.name,
            hostname=self._hostname,
            pid=os.getpid(),
            engine=self._engine_name,
            state=self._state,
            capacity=engine.capacity if engine else self._spec.max_batch,
            jobs=0,  # the registry knows
            steps=engine.steps if engine else 0,
            started_ms=self._started_ms,
            seen_ms=time.time_ns() // 1_000_000,
            place=self._place,
            waiting=self._answers.waiting if self._answers else 0,
        )


def _settle_down() -> None:
    """Keep the collector and busy threads from holding up a job for milliseconds."""
    # What lives from the start is never garbage; the collector needn't look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    sys.setswitchinterval(_SWITCH_S)
