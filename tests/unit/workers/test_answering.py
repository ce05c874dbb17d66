"""What is computed once: which requests, for whom, and what when the one who computes it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from broker.answers import AnswerKey, Found
from broker.errors import BrokerUnavailableError
from broker.jobs import Job, NewJob, Usage
from broker.memory import MemoryQueue
from config.catalogue import load
from config.settings import Queue
from workers.answering import AnswerDesk, ImpatientError, Patience, decoded, encoded
from workers.engine import Choice, EngineError, EngineResult, Judgement

CHAT = load()["smollm2-135m"]
EMBEDDING = load()["all-minilm-l6-v2"]
SAID = EngineResult(text="four", usage=Usage(input_tokens=7, output_tokens=1))


class _Store:
    """Keeps answers in a dictionary, as Redis would."""

    def __init__(self) -> None:
        self.kept: dict[AnswerKey, bytes] = {}
        self.claims: dict[AnswerKey, str] = {}
        self.away = False
        self.looked = threading.Event()

    def find(self, key: AnswerKey, asker: str) -> Found:
        self._reach()
        if key in self.kept:
            return Found(self.kept[key])
        claimed = self.claims.setdefault(key, asker) == asker
        if not claimed:
            self.looked.set()
        return Found(claimed=claimed)

    def keep(self, key: AnswerKey, asker: str, answer: bytes) -> None:
        self._reach()
        self.kept[key] = answer
        self.claims.pop(key, None)

    def prolong(self, key: AnswerKey, asker: str) -> bool:
        self._reach()
        return self.claims.get(key) == asker

    def release(self, key: AnswerKey, asker: str) -> None:
        self._reach()
        self.claims.pop(key, None)

    def _reach(self) -> None:
        if self.away:
            raise BrokerUnavailableError("away")


def _desk(store: _Store, spec: Any = CHAT, **options: Any) -> AnswerDesk:
    return AnswerDesk(store, spec, **{"fingerprint": "f", "max_bytes": 10_000} | options)


def _job(tenant: str = "acme", **fields: Any) -> Job:
    queue = MemoryQueue(Queue())
    new = NewJob(tenant=tenant, model="m", endpoint="/v1/chat/completions", body=b"{}")
    queue.enqueue(new)
    return replace(queue.get(new.id), **fields)


def _key(desk: AnswerDesk, **body: Any) -> AnswerKey | None:
    return desk.key(_job(), {"messages": [{"role": "user", "content": "2 + 2"}], **body})


def test_only_answers_without_chance_are_kept() -> None:
    desk = _desk(_Store())
    assert _key(desk) is None  # the model's own temperature is 0.2
    assert _key(desk, temperature=0.7) is None
    assert _key(desk, temperature=0) is not None
    assert _key(desk, temperature=0.7, seed=3) is not None
    assert _key(_desk(_Store(), EMBEDDING)) is not None
    assert desk.key(_job(no_store=True), {"temperature": 0}) is None


def test_what_makes_an_answer_another_one() -> None:
    desk = _desk(_Store())
    one = _key(desk, temperature=0)
    assert one == _key(desk, stream=True, temperature=0, user="u")
    assert one != _key(desk, temperature=0, max_tokens=5)
    assert one != _key(_desk(_Store(), fingerprint="g"), temperature=0)
    body: dict[str, Any] = {"temperature": 0}
    assert desk.key(_job("a"), body) != desk.key(_job("b"), body)
    assert desk.key(_job(endpoint="/v1/completions"), body) != desk.key(_job(), body)


def test_a_kept_answer_is_not_computed_again() -> None:
    store = _Store()
    key = AnswerKey("acme", "d")
    first = _desk(store).answer(key, "a:1", lambda: SAID, Patience())
    assert (first.source, first.result, first.name) == ("computed", SAID, key.name)
    again = _desk(store).answer(key, "b:1", _unwanted, Patience())
    assert (again.source, again.result.text) == ("kept", "four")
    assert again.result.usage == Usage(input_tokens=7, output_tokens=1, cached_tokens=7)


def test_vectors_come_back_as_they_were() -> None:
    vectors = [[0.5, -0.25, 0.0078125], [0.1, 0.2, 0.3]]
    result = EngineResult(vectors=vectors, usage=Usage(input_tokens=4))
    assert decoded(encoded(result)).vectors == vectors


def test_verdicts_are_kept_as_they_are() -> None:
    judgement = Judgement({"insult": 0.75, "threat": 0.1}, {"insult": True, "threat": False})
    result = EngineResult(judgements=[judgement], relevance=[0.123456789])
    back = decoded(encoded(result))
    assert (back.judgements, back.relevance) == (result.judgements, result.relevance)


def test_all_that_was_said_comes_back() -> None:
    token = {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}
    result = EngineResult(
        text="a",
        logprobs=[token],
        others=(Choice(text="b", finish_reason="length", logprobs=[token]),),
        judgements=[Judgement({"calm": 0.25}, {"calm": False})],
        relevance=[0.75],
        usage=Usage(input_tokens=4, cached_tokens=4, output_tokens=2),
    )
    assert decoded(encoded(result)) == result


@pytest.mark.parametrize("away", [False, True])
def test_those_who_ask_meanwhile_share_one_answer(away: bool) -> None:
    store = _Store()
    store.away = away
    desk, key = _desk(store), AnswerKey("acme", "d")
    computed: Future[EngineResult] = Future()
    begun = threading.Event()

    def compute() -> EngineResult:
        assert not begun.is_set()
        begun.set()
        return computed.result(20)

    with ThreadPoolExecutor(8) as pool:
        leader = pool.submit(desk.answer, key, "a:1", compute, Patience())
        assert begun.wait(20)
        followers = [
            pool.submit(desk.answer, key, f"f{n}:1", _unwanted, Patience()) for n in range(6)
        ]
        _until(lambda: len(desk._followed[key]) == 6)
        computed.set_result(SAID)
        assert leader.result(20).source == "computed"
        assert [each.result(20).source for each in followers] == ["shared"] * 6
        assert {each.result().result.text for each in followers} == {"four"}


def test_another_takes_over_where_the_first_one_fails() -> None:
    desk, key = _desk(_Store()), AnswerKey("acme", "d")
    fail: Future[EngineResult] = Future()
    begun = threading.Event()

    def fails() -> EngineResult:
        begun.set()
        return fail.result(20)

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(desk.answer, key, "a:1", fails, Patience())
        assert begun.wait(20)
        follower = pool.submit(desk.answer, key, "b:1", lambda: SAID, Patience())
        _until(lambda: len(desk._followed[key]) == 1)
        fail.set_exception(EngineError("internal_error", "it broke"))
        with pytest.raises(EngineError):
            leader.result(20)
        assert follower.result(20).source == "computed"


def test_an_answer_of_another_process_is_waited_for() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    store.claims[key] = "elsewhere:1"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_desk(store).answer, key, "b:1", _unwanted, Patience())
        assert store.looked.wait(20)
        store.keep(key, "elsewhere:1", encoded(SAID))
        assert waiting.result(20).source == "shared"


def test_a_job_that_waits_can_be_stopped_and_has_its_time() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    store.claims[key] = "elsewhere:1"
    patience = Patience()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_desk(store).answer, key, "b:1", _unwanted, patience)
        assert store.looked.wait(20)
        patience.stop()
        with pytest.raises(ImpatientError) as stopped:
            waiting.result(20)
    assert stopped.value.stopped
    with pytest.raises(ImpatientError) as late:
        _desk(store).answer(key, "b:1", _unwanted, Patience(until=0.0))
    assert not late.value.stopped


def test_a_stop_between_two_waits_is_heard() -> None:
    patience = Patience()
    clear = patience._event.clear

    def clear_late() -> None:
        patience.stop()
        clear()

    patience._event.clear = clear_late  # type: ignore[method-assign]
    patience.give(None)
    with pytest.raises(ImpatientError):
        patience.wait()


def test_jobs_that_wait_are_counted() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    store.claims[key] = "elsewhere:1"
    desk = _desk(store)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(desk.answer, key, f"{n}:1", _unwanted, Patience()) for n in range(2)]
        _until(lambda: desk.waiting == 2)
        store.keep(key, "elsewhere:1", encoded(SAID))
        assert [each.result(20).source for each in waiting] == ["shared", "shared"]
    assert desk.waiting == 0


def test_an_answer_that_can_t_be_kept_leaves_no_claim() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    desk = _desk(store)
    with pytest.raises(TypeError):
        desk.answer(key, "a:1", lambda: replace(SAID, text="\ud800"), Patience())
    assert (store.claims, desk._claims) == ({}, {})
    assert desk.answer(key, "b:1", lambda: SAID, Patience()).source == "computed"


def test_without_the_broker_everything_is_computed() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    store.away = True
    desk = _desk(store)
    for _ in range(2):
        answer = desk.answer(key, "a:1", lambda: SAID, Patience())
        assert (answer.source, answer.name) == ("computed", "")


def test_what_is_too_long_or_unreadable_is_computed() -> None:
    store, key = _Store(), AnswerKey("acme", "d")
    desk = _desk(store, max_bytes=100)
    answer = desk.answer(key, "a:1", lambda: replace(SAID, text="x" * 200), Patience())
    assert (answer.name, store.kept, store.claims) == ("", {}, {})
    store.kept[key] = b"[1, 2"
    assert desk.answer(key, "a:1", lambda: SAID, Patience()).result == SAID


def _unwanted() -> EngineResult:
    raise AssertionError("computed twice")


def _until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(2_000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("never came true")
