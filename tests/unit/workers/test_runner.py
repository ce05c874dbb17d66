"""A job from its lease to its outcome, whatever the engine and the broker do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import orjson
import pytest
import redis
import structlog
from prometheus_client import CollectorRegistry

from broker.answers import AnswerKey, Found, RedisAnswers
from broker.errors import BrokerUnavailableError
from broker.jobs import Claim, Delta, EventType, Job, NewJob, Outcome, Status, Usage
from broker.leases import Lease, LeaseRegistry
from broker.memory import MemoryQueue
from broker.stats import WorkerStatus
from config.catalogue import load
from config.settings import Queue
from workers.answering import AnswerDesk
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.metrics import WorkerMetrics
from workers.publisher import DeltaPublisher
from workers.runner import Runner

MODEL, OWNER = "m", "w:1"


class _Engine:
    """Answers as the test says: `respond` gets each request and its future."""

    name = "transformers"
    capacity = 4
    steps = 0
    alive = True

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.futures: dict[str, Future[EngineResult]] = {}
        self.submitted = threading.Event()
        self.respond: Callable[[EngineRequest, Future[EngineResult]], None] = lambda *_: None

    def start(self) -> None:
        """Nothing to load."""

    def stop(self) -> None:
        """Nothing to unload."""

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        future: Future[EngineResult] = Future()
        self.requests.append(request)
        self.futures[request.id] = future
        self.respond(request, future)
        self.submitted.set()
        return future

    def cancel(self, request_id: str) -> None:
        future = self.futures.get(request_id)
        if future is not None and not future.done():
            partial = EngineResult(
                text="so far", finish_reason="cancelled", usage=Usage(output_tokens=2)
            )
            future.set_exception(RequestCancelledError(partial))


class _Queue(MemoryQueue):
    """Can be away for a number of settling calls."""

    away = 0

    def complete(self, claim: Claim, outcome: Outcome) -> bool:
        self._maybe_away()
        return super().complete(claim, outcome)

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        self._maybe_away()
        return super().requeue(claim, delay_ms=delay_ms, refund=refund)

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        self._maybe_away()
        return super().emit(queue, deltas)

    def _maybe_away(self) -> None:
        if self.away:
            self.away -= 1
            raise BrokerUnavailableError("away")


class _Lab:
    def __init__(self, answers: AnswerDesk | None = None) -> None:
        self.queue = _Queue(Queue())
        self.engine = _Engine()
        self.metrics_registry = CollectorRegistry()
        self.registry = LeaseRegistry(
            self.queue,
            queue_name=MODEL,
            owner=OWNER,
            ttl_s=10,
            renew_every_s=0.02,
            status=self._status,
            healthy=lambda: True,
        )
        self.registry.start()
        self.publisher = DeltaPublisher(self.queue, MODEL, interval_s=0.01)
        self.publisher.start()
        self.runner = Runner(
            engine=self.engine,
            registry=self.registry,
            queue=self.queue,
            publisher=self.publisher,
            metrics=WorkerMetrics(MODEL, "transformers", self.metrics_registry),
            answers=answers,
        )

    def close(self) -> None:
        self.publisher.stop()
        self.registry.stop()

    def leased(self, body: dict[str, Any] | bytes | None = None, **changes: Any) -> str:
        """Enqueue a job and lease it to this worker."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body or {"messages": []})
        job = NewJob(
            tenant="acme", model=MODEL, endpoint="/v1/chat/completions", body=raw, **changes
        )
        self.queue.enqueue(job)
        assert self.lease() == [job.id]
        return job.id

    def lease(self) -> list[str]:
        claims = self.queue.claim(MODEL, OWNER, limit=4)
        self.registry.add(claims)
        return [claim.job.id for claim in claims]

    def start(self, job_id: str) -> threading.Thread:
        """Run a job in a thread, up to the engine."""
        thread = threading.Thread(target=self.runner.run, args=(job_id,), daemon=True)
        thread.start()
        assert self.engine.submitted.wait(10)
        return thread

    def get(self, job_id: str) -> Job:
        return self.queue.get(job_id)

    def count(self, status: str, code: str = "") -> float | None:
        return self.metrics_registry.get_sample_value(
            "forebay_workers_jobs_total",
            {
                "model": MODEL,
                "engine": "transformers",
                "band": "interactive",
                "status": status,
                "code": code,
            },
        )

    @staticmethod
    def _status() -> WorkerStatus:
        return WorkerStatus(
            owner=OWNER,
            queue=MODEL,
            hostname="h",
            pid=1,
            engine="transformers",
            state="ready",
            capacity=4,
            jobs=0,
            steps=0,
            started_ms=0,
            seen_ms=0,
        )


@pytest.fixture
def lab() -> Iterator[_Lab]:
    lab = _Lab()
    yield lab
    lab.close()


def test_the_same_question_is_answered_without_the_engine(valkey: str) -> None:
    client = redis.Redis.from_url(valkey, protocol=2)
    store = RedisAnswers(client, ttl_s=60, most=10)
    desk = AnswerDesk(store, load()["smollm2-135m"], fingerprint="as it is", max_bytes=10_000)
    lab = _Lab(desk)
    usage = Usage(input_tokens=5, output_tokens=2)
    lab.engine.respond = lambda _, future: future.set_result(EngineResult(text="four", usage=usage))
    body = {"messages": [{"role": "user", "content": "2 + 2"}], "temperature": 0}
    first, second = lab.leased(body), lab.leased({**body, "stream": True}, stream=True)
    other = lab.leased(body, no_store=True)
    try:
        for job_id in (first, second, other):
            lab.runner.run(job_id)
    finally:
        lab.close()
        client.close()
    outputs = [orjson.loads(lab.get(job_id).output or b"{}") for job_id in (first, second, other)]
    assert {each["choices"][0]["message"]["content"] for each in outputs} == {"four"}
    assert len({each["id"] for each in outputs}) == 3
    assert [request.id for request in lab.engine.requests] == [f"{first}:1", f"{other}:1"]
    assert lab.get(second).usage == Usage(input_tokens=5, output_tokens=2, cached_tokens=5)
    events, _ = lab.queue.events(second)
    assert [event.text for event in events if event.type is EventType.DELTA] == ["four"]


def test_a_job_that_waits_for_anothers_answer_can_be_cancelled() -> None:
    class _Elsewhere:
        """Another process computes whatever is asked."""

        looked = threading.Event()

        def find(self, key: AnswerKey, asker: str) -> Found:
            self.looked.set()
            return Found()

        keep = prolong = release = None

    store: Any = _Elsewhere()
    lab = _Lab(AnswerDesk(store, load()["all-minilm-l6-v2"], fingerprint="", max_bytes=1))
    job_id = lab.leased()
    thread = threading.Thread(target=lab.runner.run, args=(job_id,), daemon=True)
    thread.start()
    try:
        assert store.looked.wait(10)
        lab.queue.cancel(job_id)
        thread.join(10)
        assert lab.get(job_id).status is Status.CANCELLED
        late = lab.leased(execution_timeout_ms=1)
        lab.runner.run(late)
        error = lab.get(late).error
        assert error is not None
        assert error.code == "execution_timeout"
    finally:
        lab.close()


def test_a_finished_job(lab: _Lab) -> None:
    usage = Usage(input_tokens=5, output_tokens=2)
    lab.engine.respond = lambda _, future: future.set_result(
        EngineResult(text="hello", usage=usage)
    )
    job_id = lab.leased({"messages": [{"role": "user", "content": "hi"}]})
    lab.runner.run(job_id)
    job = lab.get(job_id)
    assert (job.status, job.usage) == (Status.COMPLETED, usage)
    assert job.output is not None
    assert orjson.loads(job.output)["choices"][0]["message"]["content"] == "hello"
    request = lab.engine.requests[0]
    assert request.id.startswith(job_id)
    assert request.body == {"messages": [{"role": "user", "content": "hi"}]}
    assert request.on_text is None
    assert lab.registry.held == 0
    assert lab.count("completed") == 1


def test_text_precedes_the_terminal_event_even_when_the_broker_was_away(lab: _Lab) -> None:
    def respond(request: EngineRequest, future: Future[EngineResult]) -> None:
        assert request.on_text is not None
        lab.queue.away = 3
        request.on_text("one ")
        request.on_text("two")
        future.set_result(EngineResult(text="one two"))

    lab.engine.respond = respond
    job_id = lab.leased(stream=True)
    lab.runner.run(job_id)
    events, _ = lab.queue.events(job_id)
    kinds = [event.type for event in events]
    assert kinds[-1] is EventType.COMPLETED
    assert "".join(event.text for event in events) == "one two"
    assert lab.queue.text(job_id) == "one two"


def test_the_engine_refuses(lab: _Lab) -> None:
    def respond(*_: object) -> None:
        raise EngineError("context_length_exceeded", "too long", "messages")

    lab.engine.respond = respond
    job_id = lab.leased()
    lab.runner.run(job_id)
    job = lab.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("context_length_exceeded", "messages")
    assert lab.count("failed", "context_length_exceeded") == 1


def test_a_fault_is_shown_and_logged_without_content(lab: _Lab) -> None:
    def respond(request: EngineRequest, _: object) -> None:
        raise ValueError(f"can't run {request.body}")

    lab.engine.respond = respond
    job_id = lab.leased({"messages": [{"role": "user", "content": "secret"}]})
    with structlog.testing.capture_logs() as lines:
        lab.runner.run(job_id)
    job = lab.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert job.error.code == "internal_error"
    assert "secret" not in f"{job.error} {lines}"
    failure = next(line for line in lines if line["event"] == "job_failed_unexpectedly")
    assert failure["error"] == "ValueError"
    assert "test_runner.py" in failure["where"]


def test_a_body_that_is_no_json_fails_the_job(lab: _Lab) -> None:
    job_id = lab.leased(b"{broken")
    lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.FAILED


def test_a_cancelled_job_keeps_its_partial_output(lab: _Lab) -> None:
    job_id = lab.leased()
    thread = lab.start(job_id)
    lab.queue.cancel(job_id)
    thread.join(10)
    job = lab.get(job_id)
    assert job.status is Status.CANCELLED
    assert job.output is not None
    choice = orjson.loads(job.output)["choices"][0]
    assert choice["message"]["content"] == "so far"
    assert choice["finish_reason"] == "cancelled"
    assert job.usage.output_tokens == 2


def test_a_job_cancelled_before_it_started_never_reaches_the_engine(
    lab: _Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = lab.leased()
    start_job = lab.registry.start_job

    def late(job_id: str) -> Lease:
        lab.queue.cancel(job_id)
        lease = start_job(job_id)
        assert lease.cancelled.wait(10)
        return lease

    monkeypatch.setattr(lab.registry, "start_job", late)
    lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.CANCELLED
    assert lab.engine.requests == []


def test_a_job_that_runs_for_too_long_is_stopped_and_fails(lab: _Lab) -> None:
    job_id = lab.leased(execution_timeout_ms=20)
    lab.runner.run(job_id)
    job = lab.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.message) == (
        "execution_timeout",
        "The job ran for longer than 0.02 s.",
    )
    # What it took is charged.
    assert job.usage.output_tokens == 2
    assert lab.count("failed", "execution_timeout") == 1


def test_an_answer_in_time_counts(lab: _Lab) -> None:
    lab.engine.respond = lambda _, future: future.set_result(EngineResult(text="in time"))
    job_id = lab.leased(execution_timeout_ms=60_000)
    lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.COMPLETED


def test_a_cancel_during_overtime_is_a_cancel(lab: _Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = lab.leased(execution_timeout_ms=20)
    cancel, start_job = lab.engine.cancel, lab.registry.start_job
    leases: list[Lease] = []

    def start(job_id: str) -> Lease:
        leases.append(start_job(job_id))
        return leases[0]

    def late(request_id: str) -> None:
        lab.queue.cancel(job_id)
        assert leases[0].cancelled.wait(10)
        cancel(request_id)

    monkeypatch.setattr(lab.registry, "start_job", start)
    monkeypatch.setattr(lab.engine, "cancel", late)
    lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.CANCELLED


def test_a_lost_lease_drops_the_result(lab: _Lab) -> None:
    job_id = lab.leased()
    thread = lab.start(job_id)
    # Another worker may have it from now on.
    assert lab.queue.release_owner(MODEL, OWNER) == 1
    thread.join(10)
    assert lab.get(job_id).status is Status.QUEUED
    assert lab.count("lost") == 1
    assert lab.registry.held == 0


def test_a_job_handed_back_is_no_lost_lease(lab: _Lab) -> None:
    job_id = lab.leased()
    thread = lab.start(job_id)
    lab.registry.hand_back(job_id)
    thread.join(10)
    assert lab.get(job_id).status is Status.QUEUED
    assert (lab.count("requeued"), lab.count("lost")) == (1, None)


def test_an_answer_that_can_t_be_put_down_fails_the_job(lab: _Lab) -> None:
    """Trying it again would end the same way."""
    lab.engine.respond = lambda _, future: future.set_result(EngineResult(text="half \ud83d"))
    job_id = lab.leased()
    lab.runner.run(job_id)
    job = lab.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert job.error.code == "internal_error"


def test_an_outage_is_logged_once_per_job(lab: _Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.settlement._RETRY_S", 0.01)

    def respond(_: EngineRequest, future: Future[EngineResult]) -> None:
        lab.queue.away = 5
        future.set_result(EngineResult(text="x"))

    lab.engine.respond = respond
    job_id = lab.leased()
    with structlog.testing.capture_logs() as lines:
        lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.COMPLETED
    assert [line["event"] for line in lines].count("settling_delayed") == 1


def test_text_the_broker_refuses_stops_the_attempt(lab: _Lab) -> None:
    shown = threading.Event()

    def respond(request: EngineRequest, _: object) -> None:
        lab.queue.release_owner(MODEL, OWNER)
        assert request.on_text is not None
        request.on_text("stale")
        shown.set()

    lab.engine.respond = respond
    job_id = lab.leased(stream=True)
    thread = lab.start(job_id)
    assert shown.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert lab.queue.text(job_id) == ""
    assert lab.count("lost") == 1


def test_a_lost_engine_gives_the_job_back_and_it_runs_alone_next_time(lab: _Lab) -> None:
    lab.engine.respond = lambda _, future: future.set_exception(EngineLostError("died"))
    suspect = lab.leased()
    lab.runner.run(suspect)
    assert lab.get(suspect).status is Status.QUEUED
    assert lab.count("requeued") == 1

    lab.engine.submitted.clear()
    lab.engine.respond = lambda *_: None
    assert lab.lease() == [suspect]
    thread = lab.start(suspect)
    assert lab.engine.requests[-1].id != lab.engine.requests[0].id
    companion = lab.leased()
    waiting = threading.Thread(target=lab.runner.run, args=(companion,), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert [request.id.partition(":")[0] for request in lab.engine.requests] == [suspect] * 2
    lab.engine.respond = lambda _, future: future.set_result(EngineResult())
    lab.engine.futures[lab.engine.requests[-1].id].set_result(EngineResult())
    for each in (thread, waiting):
        each.join(10)
    assert [lab.get(each).status for each in (suspect, companion)] == [Status.COMPLETED] * 2


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_a_thread_told_to_end_gives_the_job_back(lab: _Lab, error: BaseException) -> None:
    def respond(*_: object) -> None:
        raise error

    lab.engine.respond = respond
    job_id = lab.leased()
    with pytest.raises(Exception, match=type(error).__name__):
        lab.runner.run(job_id)
    assert lab.get(job_id).status is Status.QUEUED


def test_an_unknown_job_is_left_alone(lab: _Lab) -> None:
    lab.runner.run("job_unknown")
    assert lab.engine.requests == []


def test_logs_tell_ids_times_and_counts(lab: _Lab) -> None:
    lab.engine.respond = lambda _, future: future.set_result(
        EngineResult(text="secret", usage=Usage(input_tokens=5, output_tokens=2))
    )
    job_id = lab.leased({"messages": [{"role": "user", "content": "secret"}]})
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as lines:
        lab.runner.run(job_id)
    line = next(line for line in lines if line["event"] == "job_finished")
    assert (line["job_id"], line["tenant"], line["status"]) == (job_id, "acme", "completed")
    assert (line["input_tokens"], line["output_tokens"]) == (5, 2)
    assert "secret" not in str(lines)
