"""Several answers as one: begun in order, ended together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pytest

from broker.jobs import Usage
from workers.engine import EngineError, EngineResult, RequestCancelledError
from workers.engines.choices import Choices, seed_of


def _result(text: str) -> EngineResult:
    return EngineResult(text=text, usage=Usage(input_tokens=9, output_tokens=2, cached_tokens=4))


class _Lab:
    def __init__(self, count: int = 3) -> None:
        self.futures: list[Future[EngineResult]] = []
        self.stopped: list[int] = []
        self.first: Callable[[], None] | None = None
        self.refuse_at = -1
        self.choices = Choices(count, self._begin, self._stop)
        self.choices.start()

    def _begin(self, number: int, on_first: Callable[[], None] | None) -> Future[EngineResult]:
        if number == self.refuse_at:
            raise EngineError("invalid_request", "no")
        assert number == len(self.futures)
        if on_first is not None:
            self.first = on_first
        self.futures.append(Future())
        return self.futures[-1]

    def _stop(self, number: int) -> None:
        self.stopped.append(number)
        if not self.futures[number].done():
            self.futures[number].set_exception(RequestCancelledError(_result(f"cut {number}")))

    def token(self) -> None:
        assert self.first is not None
        self.first()


def test_the_others_begin_once_the_first_has_a_token() -> None:
    lab = _Lab()
    assert len(lab.futures) == 1
    lab.token()
    assert len(lab.futures) == 3
    for number in (2, 0, 1):
        assert not lab.choices.future.done()
        lab.futures[number].set_result(_result(f"text {number}"))
    whole = lab.choices.future.result(0)
    assert [whole.text, *(other.text for other in whole.others)] == ["text 0", "text 1", "text 2"]
    # The prompt counts once.
    assert whole.usage == Usage(input_tokens=9, output_tokens=6, cached_tokens=4)


def test_a_cancel_ends_all_and_keeps_what_there_is() -> None:
    lab = _Lab()
    lab.token()
    lab.futures[1].set_result(_result("whole"))
    lab.choices.cancel()
    assert sorted(lab.stopped) == [0, 2]
    with pytest.raises(RequestCancelledError) as cancelled:
        lab.choices.future.result(0)
    partial = cancelled.value.result
    assert [partial.text, *(other.text for other in partial.others)] == ["cut 0", "whole", "cut 2"]


def test_a_cancel_before_the_first_token_begins_no_others() -> None:
    lab = _Lab()
    lab.choices.cancel()
    lab.token()
    assert len(lab.futures) == 1
    assert isinstance(lab.choices.future.exception(0), RequestCancelledError)


def test_one_that_fails_ends_the_others() -> None:
    lab = _Lab()
    lab.token()
    lab.futures[2].set_exception(EngineError("internal_error", "failed"))
    assert sorted(lab.stopped) == [0, 1]
    with pytest.raises(EngineError, match="failed"):
        lab.choices.future.result(0)


def test_one_that_can_not_begin_ends_the_others() -> None:
    lab = _Lab()
    lab.refuse_at = 1
    lab.token()
    assert lab.stopped == [0]
    with pytest.raises(EngineError, match="no"):
        lab.choices.future.result(0)


def test_seeds_of_answers_differ_and_stay() -> None:
    seeds = [seed_of(7, answer) for answer in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert seeds == [seed_of(7, answer) for answer in range(16)]
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)
    assert seed_of(None, 3) is None
