"""Commands and replies, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from broker.call import Call
from broker.calls import Calls
from broker.errors import (
    DuplicateJobError,
    IdempotencyConflictError,
    JobNotFoundError,
    OverloadedError,
    QueueFullError,
    RateLimitedError,
)
from broker.jobs import Delta, Event, EventType, NewJob, Status
from broker.limits import RateLimits
from broker.reading_calls import Listing
from broker.wire import decode_event, pack
from config.settings import Queue

CALLS = Calls(Queue())


def _new(**fields: Any) -> NewJob:
    return NewJob(tenant="a", model="m", endpoint="/v1/x", body=b"{}", **fields)


def _answer(call: Call[Any], *replies: Any, repeated: bool = False) -> Any:
    return call.decode(list(replies), repeated)


def test_commands_on_the_wire() -> None:
    packed = pack([("SET", b"\r\n", "ü"), ("ZADD", 12, 0.1)])
    assert packed == (
        b"*3\r\n$3\r\nSET\r\n$2\r\n\r\n\r\n$2\r\n\xc3\xbc\r\n*3\r\n$4\r\nZADD\r\n$2\r\n12\r\n$3\r\n0.1\r\n"
    )


def test_an_enum_is_sent_as_its_value() -> None:
    assert pack([(Status.QUEUED,)]) == b"*1\r\n$6\r\nqueued\r\n"


def test_answers_to_an_enqueue() -> None:
    call = CALLS.enqueue(_new())
    assert _answer(call, [0, 3, 5, []]).position == 3
    with pytest.raises(DuplicateJobError):
        _answer(call, [1, 3, 5, []])
    assert _answer(call, [1, 3, 5, []], repeated=True).position == 3
    replay = _answer(call, [4, 0, 5, [], b"job_first"])
    assert (replay.job_id, replay.replayed) == ("job_first", True)
    with pytest.raises(IdempotencyConflictError, match="job_first"):
        _answer(call, [5, b"job_first"])
    outlook = [5, None, None, 5, 5, [0, 0, 0], 0, 0, [None, None]]
    for code, scope in ((2, "tenant"), (3, "model")):
        with pytest.raises(QueueFullError, match=f"{scope} queue is full \\(9 jobs\\)") as full:
            _answer(call, [code, 9, outlook, 9, b"batch"])
        assert isinstance(full.value, OverloadedError) == (scope == "model")
        assert full.value.retry_after_ms == 5_000


def test_a_limit_that_is_reached() -> None:
    meters = [3, b"120000.0", 0, b"", 0, b"", 500, b""]
    with pytest.raises(RateLimitedError) as limited:
        _answer(CALLS.enqueue(_new()), [7, 4, 1_500, 500, 90_000, meters, [], b"batch"])
    error = limited.value
    assert (error.scope, error.kind, error.limit, error.retry_after_ms) == (
        "key",
        "tokens",
        500,
        1_500,
    )
    assert [(each.scope, each.kind, each.remaining) for each in error.limits] == [
        ("tenant", "requests", 1),
        ("key", "tokens", 500),
    ]


def test_limits_are_sent_only_when_there_are_any() -> None:
    def sent(**fields: Any) -> object:
        (command,) = CALLS.enqueue(_new(**fields)).commands
        return command[3 + 12], command[3 + 14]

    limits = RateLimits(requests_per_minute=1, tokens_per_minute=2, max_jobs=3)
    only_jobs = RateLimits(max_jobs=3)
    assert sent() == ("", 0)
    assert sent(limits=limits) == ("1|2|3|0|0", 0)
    assert sent(key_id="k", key_limits=limits) == ("0|0|0|1|2", 3)
    assert sent(key_id="k", key_limits=only_jobs) == ("0|0|0|0|0", 3)
    assert sent(key_limits=limits) == ("", 0), "limits of a key need a key"


def test_what_a_job_does_not_have_is_not_sent() -> None:
    (bare,), (full,) = (
        CALLS.enqueue(job).commands
        for job in (
            _new(),
            _new(key_id="k", metadata=b'{"a":1}', stream=True, request_id="r"),
        )
    )
    extra = {"key_id", "metadata", "stream", "request_id"}
    assert not extra & set(bare)
    assert extra <= set(full)


def test_a_script_call_can_be_sent_by_source() -> None:
    call = CALLS.enqueue(_new())
    (command,) = call.by_source
    assert call.script is not None
    assert command[:2] == ("EVAL", call.script.source)
    assert command[2:] == call.commands[0][2:]


def test_text_without_a_start_must_not_be_sent_twice() -> None:
    delta = Delta(job_id="j", attempt=1, text="x")
    placed = Delta(job_id="j", attempt=1, text="x", start=0)
    assert not CALLS.emit("m", [delta]).repeatable
    assert not CALLS.emit("m", [placed, delta]).repeatable
    assert CALLS.emit("m", [placed]).repeatable
    assert CALLS.enqueue(_new()).repeatable


def test_half_a_character_does_not_stop_a_stream() -> None:
    delta = Delta(job_id="j", attempt=1, text="\ud83d")
    assert b"?" in CALLS.emit("m", [delta]).commands[0]


def test_a_record_in_either_protocol() -> None:
    raw = {b"tenant": b"a", b"band": b"batch", b"status": b"queued"}
    flat = [part for pair in raw.items() for part in pair]
    call = CALLS.get("job_1", "a")
    assert _answer(call, raw) == _answer(call, flat)
    with pytest.raises(JobNotFoundError):
        _answer(call, [])


def test_the_first_event_is_told_without_being_stored() -> None:
    queued = Event(seq=1, type=EventType.QUEUED, attempt=0)
    second = b'{"seq":2,"type":"job.in_progress","attempt":1}'
    later = b'{"seq":9,"type":"job.delta","attempt":1,"text":"x"}'
    assert _answer(CALLS.events("j", 0), 1, []) == ([queued], True)
    assert _answer(CALLS.events("j", 0), 1, [second])[0][0] == queued
    assert _answer(CALLS.events("j", 1), 1, [second]) == ([decode_event(second)], True)
    assert _answer(CALLS.events("j", 7), 1, [later]) == ([decode_event(later)], False)
    with pytest.raises(JobNotFoundError):
        _answer(CALLS.events("j", 0), 0, [])


def test_a_listing_goes_on_until_its_page_is_full() -> None:
    def listing() -> Listing:
        return Listing(
            tenant="a",
            status=None,
            model=None,
            band=None,
            created_after_ms=0,
            after=None,
            limit=1,
            newest_first=True,
        )

    record = [b"band", b"batch", b"status", b"queued"]
    short = listing()
    short.feed([b"job_1"])
    assert not short.done
    assert b"job_1" in pack(short.call().commands)
    short.feed([b"", b"job_2", record])
    assert short.done
    assert [job.id for job in short.page[0]] == ["job_2"]
    assert short.page[1] is False
    full = listing()
    full.feed([b"job_3", b"job_2", record, b"job_3", record])
    assert full.done
    assert [job.id for job in full.page[0]] == ["job_2"]
    assert full.page[1] is True
