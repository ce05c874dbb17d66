"""The batch on a clock of steps counts what it serves."""

from __future__ import annotations

import pytest

from broker.jobs import Band
from loadtests.batching import Fifo, Served, Work, serve
from loadtests.harness import BenchError


def work(tenant: str, *, prompt: int = 3, answer: int = 2, band: Band = Band.STANDARD) -> Work:
    return Work(tenant=tenant, band=band, prompt=prompt, answer=answer, cost=prompt + answer)


def test_prompts_count_at_the_start_and_answers_token_by_token() -> None:
    seen: list[dict[str, int]] = []

    def look(served: Served) -> None:
        seen.append(dict(served.tenants))

    served = serve(Fifo(), [work("a"), work("b"), work("a")], slots=1, each_step=look)
    # "b" has nothing waiting once its job has started: that step is the last.
    assert seen == [{"a": 4}, {"a": 5}, {"a": 5, "b": 4}]
    assert served.steps == 3
    assert served.bands == {Band.STANDARD: 9}


def test_the_fullest_batch_is_remembered() -> None:
    jobs = [work("a", prompt=10), work("b", prompt=20), work("a"), work("b")]
    assert serve(Fifo(), jobs, slots=2).batch_tokens == 10 + 2 + 20 + 2


class Empty(Fifo):
    def take(self, most: int) -> list[tuple[object, Work]]:
        return []


def test_a_queue_that_gives_nothing_ends_the_run() -> None:
    with pytest.raises(BenchError, match="gave nothing"):
        serve(Empty(), [work("a")], slots=1)
