"""The event log and the text of a job."""

from __future__ import annotations

from broker.jobs import Delta, Event, EventType
from tests.contract.harness import LEASE_MS, MODEL, Harness


def _emit(harness: Harness, job_id: str, *texts: str, attempt: int = 1) -> None:
    deltas = [Delta(job_id=job_id, attempt=attempt, text=text) for text in texts]
    assert harness.queue.emit(MODEL, deltas) == []


def test_a_job_tells_its_whole_life_without_gaps(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    claim = harness.claim_one()
    _emit(harness, job_id, "Hel", "lo")
    _emit(harness, job_id, ' "wörld"\n\x00\u2028😀/')
    harness.finish(claim)
    log, complete = harness.queue.events(job_id)
    assert complete
    assert log == [
        Event(seq=1, type=EventType.QUEUED, attempt=0),
        Event(seq=2, type=EventType.IN_PROGRESS, attempt=1),
        Event(seq=3, type=EventType.DELTA, attempt=1, text="Hel"),
        Event(seq=4, type=EventType.DELTA, attempt=1, text="lo"),
        Event(seq=5, type=EventType.DELTA, attempt=1, text=' "wörld"\n\x00\u2028😀/'),
        Event(seq=6, type=EventType.COMPLETED, attempt=1),
    ]
    assert harness.queue.get(job_id).seq == 6
    assert harness.queue.text(job_id) == 'Hello "wörld"\n\x00\u2028😀/'


def test_reading_on_from_a_cursor(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    harness.claim_one()
    _emit(harness, job_id, "a", "b", "c")
    log, complete = harness.queue.events(job_id, after=3)
    assert ([event.text for event in log], complete) == (["b", "c"], True)
    assert harness.queue.events(job_id, after=5) == ([], True)
    assert harness.queue.events(job_id, after=99) == ([], True)


def test_an_empty_piece_is_no_event(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    harness.claim_one()
    _emit(harness, job_id, "")
    assert len(harness.log(job_id)) == 2
    assert harness.queue.emit(MODEL, []) == []


def test_a_new_attempt_starts_its_text_anew(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    harness.claim_one()
    _emit(harness, job_id, "half a sent")
    harness.advance(LEASE_MS + 1_000)
    harness.claim_one()
    assert harness.queue.text(job_id) == ""
    _emit(harness, job_id, "anew", attempt=2)
    assert harness.queue.text(job_id) == "anew"
    seqs = [event.seq for event in harness.log(job_id)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_stale_and_current_pieces_in_one_call(harness: Harness) -> None:
    ids = [harness.submit(stream=True) for _ in range(3)]
    harness.claim(3)
    deltas = [
        Delta(job_id=ids[0], attempt=1, text="a"),
        Delta(job_id=ids[1], attempt=7, text="b"),
        Delta(job_id="job_none", attempt=1, text="c"),
        Delta(job_id=ids[2], attempt=1, text="d"),
    ]
    assert harness.queue.emit(MODEL, deltas) == [ids[1], "job_none"]
    assert [harness.queue.text(job_id) for job_id in ids] == ["a", "", "d"]


def test_a_long_log_is_trimmed_and_says_so(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    claim = harness.claim_one()
    for _ in range(10):
        _emit(harness, job_id, *["x"] * 100)
    harness.finish(claim)
    log, complete = harness.queue.events(job_id)
    assert not complete
    assert 512 <= len(log) <= 700
    assert log[-1] == Event(seq=1_003, type=EventType.COMPLETED, attempt=1)
    assert [event.seq for event in log] == list(range(log[0].seq, 1_004))
    assert harness.queue.events(job_id, after=log[0].seq - 2)[1] is False
    assert harness.queue.events(job_id, after=log[0].seq - 1) == (log, True)
    assert harness.queue.text(job_id) == "x" * 1_000


def test_a_piece_sent_again_is_published_once(harness: Harness) -> None:
    job_id = harness.submit(stream=True)
    harness.claim_one()
    size = len("é".encode())
    for text, start in (("é", 0), ("é", 0), ("éa", 0), ("b", size + 1), ("ab", size)):
        delta = Delta(job_id=job_id, attempt=1, text=text, start=start)
        assert harness.queue.emit(MODEL, [delta]) == []
    assert harness.queue.text(job_id) == "éab"
    assert [event.text for event in harness.log(job_id)[2:]] == ["é", "a", "b"]
