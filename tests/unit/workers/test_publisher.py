"""Deltas on their way out: coalesced, in order, patient, and dropped when they no longer count."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from broker.errors import BrokerError, BrokerUnavailableError
from broker.jobs import Delta, NewJob
from broker.memory import MemoryQueue
from config.settings import Queue
from workers.publisher import DeltaPublisher


class _Queue(MemoryQueue):
    """Notes the calls of `emit`; can be away, and can call attempts stale."""

    def __init__(self) -> None:
        super().__init__(Queue())
        self.calls: list[list[Delta]] = []
        self.called = threading.Event()
        self.away = False
        self.stale: list[str] = []

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        try:
            if self.away:
                raise BrokerUnavailableError("away")
            self.calls.append(list(deltas))
            return self.stale
        finally:
            self.called.set()

    def text(self, job_id: str) -> str:
        return "".join(d.text for call in self.calls for d in call if d.job_id == job_id)


@pytest.fixture
def queue() -> _Queue:
    return _Queue()


@pytest.fixture
def publisher(queue: _Queue) -> Iterator[DeltaPublisher]:
    publisher = DeltaPublisher(queue, "m", interval_s=0.05)
    yield publisher
    publisher.stop()


def _ignore() -> None:
    """Nobody cares."""


def test_one_call_carries_the_text_of_all_jobs(publisher: DeltaPublisher, queue: _Queue) -> None:
    streams = [publisher.open(f"job_{i}", 2, on_stale=_ignore) for i in range(3)]
    for piece in ("a", "b"):
        for stream in streams:
            stream.write(piece)
    publisher.start()
    assert queue.called.wait(10)
    publisher.stop()
    assert queue.calls == [
        [Delta(job_id=f"job_{i}", attempt=2, text="ab", start=0) for i in range(3)]
    ]


def test_flush_publishes_now_and_only_this_stream(publisher: DeltaPublisher, queue: _Queue) -> None:
    mine, other = (publisher.open(f"job_{i}", 1, on_stale=_ignore) for i in range(2))
    mine.write("x")
    other.write("y")
    mine.flush()
    mine.flush()
    assert queue.calls == [[Delta(job_id="job_0", attempt=1, text="x", start=0)]]


def test_text_waits_in_order_while_the_broker_is_away(
    publisher: DeltaPublisher, queue: _Queue
) -> None:
    stream = publisher.open("job_a", 1, on_stale=_ignore)
    queue.away = True
    publisher.start()
    stream.write("one ")
    assert queue.called.wait(10)
    stream.write("two ")
    with pytest.raises(BrokerUnavailableError):
        stream.flush()
    stream.write("three")
    queue.away = False
    publisher.stop()
    assert queue.text("job_a") == "one two three"


def test_a_stale_attempt_is_told_once_and_its_text_dropped(
    publisher: DeltaPublisher, queue: _Queue
) -> None:
    told: list[str] = []
    stale = publisher.open("job_a", 1, on_stale=lambda: told.append("a"))
    fresh = publisher.open("job_b", 1, on_stale=lambda: told.append("b"))
    queue.stale = ["job_a"]
    for _ in range(2):
        for stream in (stale, fresh):
            stream.write("x")
            stream.flush()
    assert told == ["a"]
    assert queue.text("job_a") == "x"
    assert queue.text("job_b") == "xx"


def test_a_closed_stream_keeps_nothing(publisher: DeltaPublisher, queue: _Queue) -> None:
    stream = publisher.open("job_a", 1, on_stale=_ignore)
    stream.write("x")
    stream.close()
    stream.write("y")
    stream.flush()
    publisher.start()
    publisher.stop()
    assert queue.calls == []


class _Lossy(MemoryQueue):
    """Does as told, and loses the answer."""

    losses = 0

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        stale = super().emit(queue, deltas)
        if self.losses:
            self.losses -= 1
            raise BrokerUnavailableError("the answer was lost")
        return stale


def test_text_whose_answer_was_lost_is_published_once() -> None:
    queue = _Lossy(Queue())
    job = NewJob(tenant="acme", model="m", endpoint="/v1/test", body=b"{}", stream=True)
    queue.enqueue(job)
    (claim,) = queue.claim("m", "w:1")
    publisher = DeltaPublisher(queue, "m", interval_s=0.05)
    stream = publisher.open(job.id, claim.attempt, on_stale=_ignore)
    stream.write("grün ")
    stream.flush()
    queue.losses = 2
    stream.write("一二 ")
    with pytest.raises(BrokerUnavailableError):
        stream.flush()
    stream.write("and ")
    with pytest.raises(BrokerUnavailableError):
        stream.flush()
    stream.write("on")
    stream.flush()
    assert queue.text(job.id) == "grün 一二 and on"
    events, _ = queue.events(job.id)
    assert "".join(event.text for event in events) == "grün 一二 and on"


@pytest.mark.parametrize("fault", [BrokerError("refused"), RuntimeError("a bug")])
def test_the_thread_outlives_whatever_a_call_raises(
    queue: _Queue, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    publisher = DeltaPublisher(queue, "m", interval_s=0.01)
    emit, raised = queue.emit, threading.Event()

    def once(name: str, deltas: Sequence[Delta]) -> list[str]:
        if not raised.is_set():
            raised.set()
            raise fault
        return emit(name, deltas)

    monkeypatch.setattr(queue, "emit", once)
    publisher.start()
    publisher.open("job_a", 1, on_stale=_ignore).write("x")
    assert queue.called.wait(10)
    assert raised.is_set()
    assert queue.text("job_a") == "x"
    publisher.stop()


def test_the_thread_outlives_a_failing_engine(publisher: DeltaPublisher, queue: _Queue) -> None:
    def fail() -> None:
        raise RuntimeError("can't cancel")

    queue.stale = ["job_a"]
    publisher.open("job_a", 1, on_stale=fail).write("x")
    publisher.start()
    assert queue.called.wait(10)
    queue.called.clear()
    publisher.open("job_b", 1, on_stale=_ignore).write("y")
    assert queue.called.wait(10)
    assert queue.text("job_b") == "y"
