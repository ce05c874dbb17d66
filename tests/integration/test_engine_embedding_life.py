"""The embedding engine when its thread dies or stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from tests.integration.real_models import real_model
from workers.engine import EngineLostError, EngineRequest
from workers.engines.bucketing import Piece
from workers.engines.encoder import EncoderEngine

pytestmark = pytest.mark.model


class Lab:
    """An engine whose model does as it is told."""

    def __init__(self) -> None:
        self.lost, self.dead, self.release = (threading.Event() for _ in range(3))
        self.engine = EncoderEngine(
            *real_model("all-minilm-l6-v2"),
            threads=2,
            stall_s=0.5,
            on_lost=self.lost.set,
            on_dead=self.dead.set,
        )
        self.engine.start()

    def instead_of_the_model(self, act: Callable[[], None]) -> None:
        def compute(batch: Sequence[Piece]) -> Any:
            act()
            return np.zeros((len(batch), 1))

        self.engine._head.compute = compute  # type: ignore[method-assign]

    def submit(self, name: str = "job_1") -> Any:
        body = {"input": ["words"]}
        return self.engine.submit(EngineRequest(id=name, endpoint="/v1/embeddings", body=body))


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.release.set()
    lab.engine.stop()


def _end_the_thread() -> None:
    raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_loses_its_requests(lab: Lab) -> None:
    lab.instead_of_the_model(_end_the_thread)
    future = lab.submit()
    with pytest.raises(EngineLostError):
        future.result(10)
    # Who knows what it left of the model: this process has to go.
    assert lab.dead.wait(10)
    assert lab.lost.is_set()
    assert not lab.engine.alive
    with pytest.raises(EngineLostError):
        lab.submit()


def test_a_stuck_batch_is_noticed(lab: Lab) -> None:
    def stuck() -> None:
        lab.release.wait(30)

    lab.instead_of_the_model(stuck)
    future = lab.submit()
    with pytest.raises(EngineLostError):
        future.result(10)
    assert lab.dead.wait(10)
    assert not lab.engine.alive


def test_a_stuck_batch_shows_beside_others_that_run(lab: Lab) -> None:
    stuck = threading.Event()

    def act() -> None:
        if not stuck.is_set():
            stuck.set()
            lab.release.wait(30)

    lab.instead_of_the_model(act)
    futures = [lab.submit("job_1")]
    assert stuck.wait(10)
    number = 2
    while not lab.dead.is_set():
        with suppress(EngineLostError):
            assert len(lab.submit(f"job_{number}").result(10).vectors) == 1
        number += 1
    assert number > 3
    with pytest.raises(EngineLostError):
        futures[0].result(10)


def test_an_idle_engine_is_left_alone(lab: Lab) -> None:
    # A busy machine may take longer over a real batch than this engine lets one.
    lab.instead_of_the_model(lambda: None)
    assert not lab.dead.wait(1.0)
    assert len(lab.submit().result(30).vectors) == 1
