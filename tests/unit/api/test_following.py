"""Events in order and without gaps, over lost connections and an absent queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from api.delivery import following
from api.delivery.background import Background
from api.delivery.closing import Closing
from api.delivery.following import Follower, Snapshot, final_record
from api.delivery.relay import DivergedError, TextRelay
from broker.errors import BrokerUnavailableError
from broker.jobs import Event, EventType, Job, NewJob, Status
from broker.memory import MemoryQueue
from broker.results import RESYNC, Resync
from config.settings import Queue


def _delta(seq: int, text: str = "x", attempt: int = 1) -> Event:
    return Event(seq=seq, type=EventType.DELTA, attempt=attempt, text=text)


END = Event(seq=9, type=EventType.COMPLETED, attempt=1)


class Subscription:
    """Says what it was given, then nothing."""

    def __init__(self, *items: Event | Resync) -> None:
        self.items = list(items)

    async def next(self, timeout_s: float | None) -> Event | Resync | None:
        return self.items.pop(0) if self.items else None


class Log:
    """The queue of a single job."""

    def __init__(self, *events: Event, complete: bool = True, absent: int = 0) -> None:
        memory = MemoryQueue(Queue())
        memory.enqueue(NewJob(id="job_1", tenant="t", model="m", endpoint="/", body=b"{}"))
        self.record = memory.get("job_1")
        self.log = list(events)
        self.complete = complete
        #: Calls that fail before the queue is back.
        self.absent = absent
        self.reads = 0
        self.texts = ["text"]

    def _call(self) -> None:
        self.reads += 1
        if self.absent:
            self.absent -= 1
            raise BrokerUnavailableError

    async def events(self, _: str, *, after: int = 0) -> tuple[list[Event], bool]:
        self._call()
        return [event for event in self.log if event.seq > after], self.complete

    async def get(self, _: str, *, tenant: str | None = None) -> Job:
        self._call()
        return self.record

    async def text(self, _: str) -> str:
        if len(self.texts) > 1:
            # It grows under the reader.
            self.record = replace(self.record, seq=self.record.seq + 1)
            return self.texts.pop(0)
        return self.texts[0]


async def _all(follower: Follower, *, timeout_s: float = 1.0) -> list[Any]:
    found = []
    while not follower.finished and (item := await follower.next(timeout_s)) is not None:
        found.append(item)
    return found


def _follow(log: Log, *items: Event | Resync, **more: Any) -> Follower:
    return Follower(log, Subscription(*items), "job_1", **more)  # type: ignore[arg-type]


async def test_live_events_pass_and_old_ones_do_not() -> None:
    log = Log()
    follower = _follow(log, _delta(2), _delta(2), _delta(1), _delta(3), after=1)
    assert [event.seq for event in await _all(follower)] == [2, 3]
    assert log.reads == 0


@pytest.mark.parametrize("sign", [RESYNC, _delta(4)], ids=["resync", "gap"])
async def test_what_was_missed_comes_from_the_log(sign: Event | Resync) -> None:
    log = Log(_delta(1), _delta(2), _delta(3), _delta(4), END)
    follower = _follow(log, _delta(2), sign, after=1)
    assert [event.seq for event in await _all(follower)] == [2, 3, 4, 9]
    assert follower.finished


async def test_silence_makes_it_look_at_the_log() -> None:
    log = Log(_delta(1), END)
    follower = _follow(log, after=1)
    assert await follower.next(0.01) is None
    assert await follower.next(0.01) == END


async def test_an_absent_queue_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_RETRY_S", 0.001)
    follower = _follow(Log(END, absent=3), RESYNC, after=8)
    assert await follower.next(1.0) == END


async def test_an_absent_queue_takes_no_longer_than_asked() -> None:
    follower = _follow(Log(END, absent=1000), RESYNC, after=8)
    assert await follower.next(0.01) is None


async def test_a_log_that_does_not_reach_back_gives_a_snapshot() -> None:
    log = Log(complete=False)
    log.texts = ["a", "ab", "abc"]
    item = await _follow(log, from_log=True).next(1.0)
    assert item == Snapshot(seq=log.record.seq, attempt=0, status=Status.QUEUED, text="abc")


async def test_the_snapshot_of_an_ended_job_is_the_end() -> None:
    log = Log(complete=False)
    log.record = replace(log.record, status=Status.COMPLETED)
    follower = _follow(log, from_log=True)
    await follower.next(1.0)
    assert follower.finished


async def test_waiting_for_the_end_has_its_time() -> None:
    assert await _follow(Log(), END, after=8).terminal(within_s=5)
    assert not await _follow(Log(), after=8).terminal(within_s=0)


async def test_the_final_record_is_read_over_a_short_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "_RETRY_S", 0.001)
    log = Log(absent=2)
    assert await final_record(log, "job_1", within_s=1) is log.record  # type: ignore[arg-type]
    with pytest.raises(BrokerUnavailableError):
        await final_record(Log(absent=1000), "job_1", within_s=0.01)  # type: ignore[arg-type]


def test_text_of_one_attempt_is_relayed_as_it_comes() -> None:
    relay = TextRelay()
    assert [relay.take(_delta(1, "a")), relay.take(_delta(2, "b"))] == ["a", "b"]
    assert relay.take(END) == ""
    assert relay.complete("abc") == "c"


def test_a_new_attempt_repeats_before_it_goes_on() -> None:
    relay = TextRelay()
    relay.take(_delta(1, "abc"))
    assert [
        relay.take(_delta(2, "a", 2)),
        relay.take(_delta(3, "bcd", 2)),
        relay.take(_delta(4, "e", 2)),
        relay.take(_delta(5, "late", 1)),
    ] == ["", "d", "e", ""]
    assert relay.complete("abcde") == ""


def test_a_third_attempt_repeats_all_that_was_sent() -> None:
    relay = TextRelay()
    relay.take(_delta(1, "ab"))
    relay.take(_delta(2, "a", 2))
    assert [relay.take(_delta(3, "abc", 3)), relay.take(_delta(4, "d", 3))] == ["c", "d"]


@pytest.mark.parametrize("said", ["x", "abx", "abcx"])
def test_a_new_attempt_that_differs_is_noticed(said: str) -> None:
    relay = TextRelay()
    relay.take(_delta(1, "abcd"))
    with pytest.raises(DivergedError):
        relay.take(_delta(2, said, 2))


def test_an_end_that_differs_is_noticed() -> None:
    relay = TextRelay()
    relay.take(_delta(1, "abc"))
    with pytest.raises(DivergedError):
        relay.complete("abx")


def test_a_snapshot_fills_what_was_missed() -> None:
    relay = TextRelay()
    relay.take(_delta(1, "ab"))
    snapshot = Snapshot(seq=5, attempt=1, status=Status.IN_PROGRESS, text="abcd")
    assert relay.take(snapshot) == "cd"
    assert relay.take(_delta(6, "e")) == "e"


def test_the_snapshot_of_a_younger_attempt_is_a_repetition() -> None:
    relay = TextRelay()
    relay.take(_delta(1, "abcd"))
    assert relay.take(Snapshot(seq=5, attempt=2, status=Status.IN_PROGRESS, text="ab")) == ""
    assert [relay.take(_delta(6, "cd", 2)), relay.take(_delta(7, "e", 2))] == ["", "e"]


async def test_background_work_is_awaited_at_the_end() -> None:
    background = Background()
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0)
        done.set()

    background.spawn(work())
    await background.drain(1)
    assert done.is_set()


async def test_background_work_that_hangs_is_given_up() -> None:
    background = Background()
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    background.spawn(hang())
    await background.drain(0.01)
    await asyncio.wait_for(ended.wait(), 1)


async def test_closing_interrupts_whoever_waits_and_whoever_comes_later() -> None:
    closing = Closing()
    loop = asyncio.get_running_loop()
    loop.call_soon(closing.begin)
    async with closing.interrupts():
        await asyncio.Event().wait()
    async with closing.interrupts():
        await asyncio.Event().wait()


async def test_an_error_of_the_block_is_not_swallowed() -> None:
    closing = Closing()
    with pytest.raises(TimeoutError):
        async with closing.interrupts():
            raise TimeoutError
