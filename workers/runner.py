"""Runs one leased job on the engine and settles it with the broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import orjson
from structlog.contextvars import bound_contextvars

from broker.jobs import Job, JobError, Outcome, Status, Usage
from broker.leases import Lease, LeaseRegistry
from broker.pieces import TokenLogprob, in_pieces, piece
from broker.queue import JobQueue
from config.logs import get_logger
from workers.answering import Answer, AnswerDesk, ImpatientError, Patience
from workers.engine import (
    Engine,
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.metrics import WorkerMetrics
from workers.publisher import DeltaPublisher, TextStream
from workers.responses import response_body
from workers.settlement import Settlement
from workers.supervision import SoloGate

log = get_logger(__name__)

#: Shown to the owner when something broke that is not the request's fault.
_INTERNAL = JobError(code="internal_error", message="the job failed because of a fault in Forebay")


class _OvertimeError(Exception):
    """The attempt has run for longer than its job allows; the engine was stopped."""

    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self.usage = usage


class JobInterruptedError(Exception):
    """A job was given back because its thread was told to end."""


class Runner:
    """Everything a job needs between its lease and its outcome. Thread-safe."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: LeaseRegistry,
        queue: JobQueue,
        publisher: DeltaPublisher,
        metrics: WorkerMetrics,
        answers: AnswerDesk | None = None,
    ) -> None:
        """`answers`: None where none are kept."""
        self._engine = engine
        self._registry = registry
        self._queue = queue
        self._publisher = publisher
        self._metrics = metrics
        self._answers = answers
        self._simulated = engine.name == "simulated"
        self._gate = SoloGate()

    def run(self, job_id: str) -> None:
        """Run a job this worker holds a lease of; returns when it is settled or no longer ours."""
        try:
            lease = self._registry.start_job(job_id)
        except KeyError:
            log.warning("job_not_leased", job_id=job_id)
            return
        job = lease.claim.job
        with bound_contextvars(job_id=job.id, tenant=job.tenant, request_id=job.request_id):
            _Attempt(self, lease).run()


class _Attempt:
    """One attempt at one job."""

    def __init__(self, runner: Runner, lease: Lease) -> None:
        self._runner = runner
        self._lease = lease
        self._job: Job = lease.claim.job
        self._body: dict[str, Any] = {}
        #: The engine never sees two attempts at a job as one request.
        self._request_id = f"{self._job.id}:{lease.claim.attempt}"
        self._stream: TextStream | None = None
        self._started = time.monotonic()
        self._first_text_s: float | None = None
        self._answer: Answer | None = None
        self._settlement = Settlement(runner._queue, lease, before=self._flush)

    def run(self) -> None:
        job, runner = self._job, self._runner
        runner._metrics.job_started(job)
        log.debug("job_started", model=job.model, endpoint=job.endpoint, attempt=job.attempt)
        status, code, usage = "lost", "", Usage()
        try:
            status, code, usage = self._settle()
        except Exception:
            log.exception("job_settling_failed")
            raise
        finally:
            if self._stream is not None:
                self._stream.close()
            runner._registry.settle(self._lease)
            run_s = time.monotonic() - self._started
            runner._metrics.job_ended(job, status, code, run_s, usage)
            if status == "lost":
                runner._metrics.lease_lost()
            log.info(
                "job_finished",
                model=job.model,
                endpoint=job.endpoint,
                attempt=job.attempt,
                status=status,
                code=code,
                wait_ms=max(0, job.started_ms - job.created_ms),
                run_ms=round(run_s * 1000, 1),
                first_text_ms=self._first_text_ms,
                answer=self._answer.source if self._answer is not None else None,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
            )

    @property
    def _first_text_ms(self) -> float | None:
        return None if self._first_text_s is None else round(self._first_text_s * 1000, 1)

    def _settle(self) -> tuple[str, str, Usage]:
        """Run the job and tell the broker how it ended; returns status, error code and usage."""
        try:
            outcome = self._completed(self._generate())
        except EngineError as error:
            failure = JobError(code=error.code, message=str(error), param=error.param)
            return self._settlement.complete(Outcome(status=Status.FAILED, error=failure))
        except RequestCancelledError as stopped:
            return self._stopped(stopped.result)
        except ImpatientError as error:
            if error.stopped:
                return self._stopped(EngineResult(finish_reason="cancelled"))
            return self._settlement.complete(Outcome(status=Status.FAILED, error=self._overtime()))
        except _OvertimeError as stopped:
            return self._settlement.complete(
                Outcome(status=Status.FAILED, error=self._overtime(), usage=stopped.usage)
            )
        except EngineLostError:
            self._runner._gate.suspect(self._job.id)
            return self._settlement.give_back()
        except Exception as error:
            # The traceback's values could hold the prompt, its type and place do not.
            log.error("job_failed_unexpectedly", error=type(error).__name__, where=_place(error))
            return self._settlement.complete(Outcome(status=Status.FAILED, error=_INTERNAL))
        except BaseException as error:
            self._runner._engine.cancel(self._request_id)
            self._settlement.give_back()
            raise JobInterruptedError(type(error).__name__) from error
        return self._settlement.complete(outcome)

    def _generate(self) -> EngineResult:
        runner = self._runner
        self._body = orjson.loads(self._job.body)
        with runner._gate.enter(self._job.id):
            if self._lease.stopping:
                raise RequestCancelledError(EngineResult(finish_reason="cancelled"))
            desk = runner._answers
            key = desk.key(self._job, self._body) if desk is not None else None
            if desk is None or key is None:
                return self._compute()
            patience = Patience(self._until)
            self._lease.on_stop(patience.stop)
            self._answer = desk.answer(key, self._request_id, self._compute, patience)
            runner._metrics.answered(self._answer.source)
            return self._answer.result

    @property
    def _until(self) -> float | None:
        """When the attempt's time is up, on the monotonic clock (s)."""
        limit_ms = self._job.execution_timeout_ms
        return self._started + limit_ms / 1000 if limit_ms else None

    def _compute(self) -> EngineResult:
        return self._await(self._submit())

    def _completed(self, result: EngineResult) -> Outcome:
        answer, charged, name = self._answer, None, ""
        if answer is not None:
            name = answer.name
            if answer.source == "kept":
                charged = 0  # one that was waited for has held a slot
            if answer.source != "computed" and self._job.stream:
                self._replay(result)
        return Outcome(
            status=Status.COMPLETED,
            output=self._output(result),
            usage=result.usage,
            charged=charged,
            answer=name,
        )

    def _replay(self, result: EngineResult) -> None:
        """Stream an answer that was there already."""
        self._open_stream(lambda: None)
        if not in_pieces(self._body):
            self._on_text(result.text)
            return
        self._on_piece(0, result.text, result.logprobs or [])
        for number, choice in enumerate(result.others, 1):
            self._on_piece(number, choice.text, choice.logprobs or [])

    def _await(self, future: Future[EngineResult]) -> EngineResult:
        """The engine's answer. Raises `_OvertimeError` when the job may not run so long."""
        if self._until is None:
            return future.result()
        try:
            return future.result(max(0.0, self._until - time.monotonic()))
        except TimeoutError:
            self._runner._engine.cancel(self._request_id)
        try:
            # It may have been finished just in time.
            return future.result()
        except RequestCancelledError as stopped:
            if self._lease.stopping:
                raise
            raise _OvertimeError(stopped.result.usage) from None

    def _overtime(self) -> JobError:
        seconds = self._job.execution_timeout_ms / 1000
        return JobError(
            code="execution_timeout", message=f"The job ran for longer than {seconds:g} s."
        )

    def _submit(self) -> Future[EngineResult]:
        runner, job = self._runner, self._job

        def cancel() -> None:
            runner._engine.cancel(self._request_id)

        if job.stream:
            self._open_stream(cancel)
        request = EngineRequest(
            id=self._request_id,
            endpoint=job.endpoint,
            body=self._body,
            on_text=None if self._stream is None else self._on_text,
            on_piece=self._on_piece if self._stream and in_pieces(self._body) else None,
        )
        future = runner._engine.submit(request)
        # Only now: a stop that was wanted earlier must find the request.
        self._lease.on_stop(cancel)
        return future

    def _open_stream(self, on_stale: Callable[[], None]) -> None:
        self._stream = self._runner._publisher.open(
            self._job.id, self._lease.claim.attempt, on_stale=on_stale
        )

    def _on_text(self, text: str) -> None:
        if self._first_text_s is None:
            self._first_text_s = time.monotonic() - self._started
            self._runner._metrics.first_text(self._job)
        assert self._stream is not None
        self._stream.write(text)

    def _on_piece(self, answer: int, text: str, logprobs: list[TokenLogprob]) -> None:
        self._on_text(piece(answer, text, logprobs))

    def _stopped(self, partial: EngineResult) -> tuple[str, str, Usage]:
        """The request was stopped: by its owner, or because the attempt no longer counts."""
        stale = self._stream is not None and self._stream.stale
        if self._lease.lost.is_set() or stale:
            return self._settlement.dropped()
        if self._lease.cancelled.is_set():
            return self._settlement.complete(
                Outcome(status=Status.CANCELLED, output=self._output(partial), usage=partial.usage)
            )
        return self._settlement.give_back()

    def _flush(self) -> None:
        """Text precedes the terminal event, on every try."""
        if self._stream is not None:
            self._stream.flush()

    def _output(self, result: EngineResult) -> bytes:
        return response_body(self._job, self._body, result, simulated=self._runner._simulated)


def _place(error: Exception) -> str:
    """`file:line` where an exception was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
