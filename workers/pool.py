"""The threads that run jobs: one per slot of the engine's batch.

Celery's own threads pool leaves a job unacknowledged, and its slot lost, when the task raises
SystemExit or MemoryError; and it can't be stopped before its last task has returned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.concurrency.base import BasePool
from celery.concurrency.thread import TaskPool

from broker import leases
from config.logs import get_logger

log = get_logger(__name__)

#: Time for the tasks to return once their jobs were handed back (s); then they are left behind.
ABANDON_S = 2.0


class _Run:
    """One task in the pool; also Celery's handle on it."""

    __slots__ = ("__weakref__", "accepted", "args", "done", "failed", "job_id", "target")

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        accepted: Callable[[int, float], None],
        done: Callable[[Any], None],
        failed: Callable[[ExceptionInfo], None],
        job_id: str,
    ) -> None:
        self.target = target
        self.args = args
        self.accepted = accepted
        self.done = done
        self.failed = failed
        self.job_id = job_id

    def __call__(self, thread_id: int) -> None:
        """Run the task. Whatever it raises, its request is told, so that the slot is freed."""
        try:
            self.accepted(thread_id, time.monotonic())
            self.done(self.target(*self.args))
        except BaseException as error:
            log.error("task_broke_out", job_id=self.job_id, error=repr(error))
            try:
                try:
                    raise WorkerLostError(repr(error))
                except WorkerLostError:
                    self.failed(ExceptionInfo())
            except BaseException:
                log.exception("task_not_acknowledged", job_id=self.job_id)

    def terminate(self, signal: Any = None) -> None:
        """A thread can't be killed; the request has already cancelled the job."""


class EnginePool(TaskPool):  # type: ignore[misc]
    """Celery's threads pool, on daemon threads of our own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        BasePool.__init__(self, *args, **kwargs)
        self._runs: SimpleQueue[_Run | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: Native thread id -> the job it runs.
        self._running: dict[int, str] = {}

    def on_start(self) -> None:
        self._threads = [
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True)
            for number in range(self.limit)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        thread_id = threading.get_native_id()
        while (run := self._runs.get()) is not None:
            self._running[thread_id] = run.job_id
            run(thread_id)
            self._running.pop(thread_id, None)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        correlation_id: str = "",
        **_: Any,
    ) -> _Run:
        run = _Run(target, args, accept_callback, callback, error_callback, correlation_id)
        self._runs.put(run)
        return run

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Cancel the job that the thread `pid` (as in `inspect active`) runs."""
        if (job_id := self._running.get(pid)) is not None:
            leases.current().cancel(job_id)

    def on_stop(self) -> None:
        """Let running jobs finish until the registry hands them back; then give them `ABANDON_S`.

        A task that hangs even then doesn't hold up the process: its job runs elsewhere.
        """
        for _ in self._threads:
            self._runs.put(None)
        registry = leases.installed()
        if registry is not None:
            registry.drain()
            registry.drained.wait(registry.grace_s + ABANDON_S)
        deadline = time.monotonic() + ABANDON_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._running:
            log.warning("tasks_abandoned", job_ids=list(self._running.values()))

    def on_terminate(self) -> None:
        self.on_stop()

    def _get_info(self) -> dict[str, Any]:
        return {**BasePool._get_info(self), "threads": len(self._threads)}
