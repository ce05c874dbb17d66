"""The engine without a model: its contract, and that it says what it is."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from config.catalogue import ModelSpec
from config.settings import Simulated
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    RequestCancelledError,
)
from workers.engines.simulated import SimulatedEngine

NO_TIME = Simulated(step_ms=0, step_ms_per_sequence=0, prefill_ms_per_token=0)


def _spec(**changes: Any) -> ModelSpec:
    fields = {"name": "m", "kind": "chat", "source": "path:/x", "context_tokens": 200}
    return ModelSpec.model_validate(fields | {"max_batch": 4} | changes)


def _chat(
    name: str = "job_1", on_text: Callable[[str], None] | None = None, **body: Any
) -> EngineRequest:
    messages = [{"role": "user", "content": "Hello"}]
    return EngineRequest(
        id=name,
        endpoint="/v1/chat/completions",
        body={"messages": messages} | body,
        on_text=on_text,
    )


@pytest.fixture
def engine() -> Iterator[SimulatedEngine]:
    engine = SimulatedEngine(_spec(), Simulated(step_ms=1))
    engine.start()
    yield engine
    engine.stop()


def test_without_time_to_spend_the_answer_is_there_at_once() -> None:
    engine = SimulatedEngine(_spec(), NO_TIME)
    engine.start()
    pieces: list[str] = []
    before = threading.active_count()
    future = engine.submit(_chat(on_text=pieces.append, max_tokens=12))
    assert future.done()
    assert threading.active_count() == before
    result = future.result()
    assert result.text == "".join(pieces)
    assert result.text.startswith("simulated")
    assert (result.finish_reason, result.usage.output_tokens) == ("length", 12)
    assert engine.alive
    assert engine.steps == 1


def test_answers_depend_on_nothing_but_the_request(engine: SimulatedEngine) -> None:
    first, second = (engine.submit(_chat(name)).result(10) for name in ("a", "b"))
    assert first == second
    assert first.finish_reason == "stop"


def test_stop_strings(engine: SimulatedEngine) -> None:
    whole = engine.submit(_chat(max_tokens=20)).result(10).text
    word = whole.split()[5]
    result = engine.submit(_chat(max_tokens=20, stop=[f" {word}"])).result(10)
    assert result.text == whole[: whole.index(f" {word}")]
    assert result.finish_reason == "stop"


def test_requests_beyond_the_capacity_wait() -> None:
    sizes: list[int] = []
    engine = SimulatedEngine(_spec(), Simulated(step_ms=1), on_step=sizes.append)
    futures = [engine.submit(_chat(f"job_{i}", max_tokens=3)) for i in range(6)]
    engine.start()
    for future in futures:
        future.result(10)
    engine.stop()
    assert sizes == [4, 4, 4, 2, 2, 2]


def test_the_cache_bounds_the_batch() -> None:
    sizes: list[int] = []
    engine = SimulatedEngine(_spec(cache_tokens=32), Simulated(step_ms=1), on_step=sizes.append)
    futures = [engine.submit(_chat(f"job_{i}", max_tokens=10)) for i in range(3)]
    engine.start()
    for future in futures:
        future.result(10)
    engine.stop()
    # 6 prompt tokens and 10 more each: two fit.
    assert sizes == [2] * 10 + [1] * 10


def test_cancel_keeps_what_there_is_and_frees_the_slot() -> None:
    engine = SimulatedEngine(_spec(max_batch=1), Simulated(step_ms=1))
    engine.start()
    some = threading.Event()
    running = engine.submit(_chat("job_1", on_text=lambda _: some.set(), max_tokens=150))
    waiting = engine.submit(_chat("job_2", max_tokens=1))
    assert some.wait(10)
    engine.cancel("job_1")
    engine.cancel("job_unknown")
    with pytest.raises(RequestCancelledError) as cancelled:
        running.result(10)
    partial = cancelled.value.result
    assert partial.text.startswith("simulated")
    assert 1 <= partial.usage.output_tokens < 150
    assert waiting.result(10).usage.output_tokens == 1
    engine.stop()


def test_steps_take_the_stated_time() -> None:
    settings = Simulated(step_ms=10, step_ms_per_sequence=5, prefill_ms_per_token=1)
    engine = SimulatedEngine(_spec(), settings)
    engine.start()
    begun = time.monotonic()
    engine.submit(_chat(max_tokens=4)).result(10)
    spent = time.monotonic() - begun
    engine.stop()
    # Four steps of 15 ms, and 6 prompt tokens once.
    assert spent >= 0.066


def test_stopping_loses_what_runs(engine: SimulatedEngine) -> None:
    future = engine.submit(_chat(max_tokens=150))
    engine.stop()
    with pytest.raises(EngineLostError):
        future.result(10)
    with pytest.raises(EngineLostError):
        engine.submit(_chat())
    assert not engine.alive


def test_admission_is_that_of_a_model(engine: SimulatedEngine) -> None:
    with pytest.raises(EngineError) as refused:
        engine.submit(_chat(max_tokens=196))
    assert refused.value.code == "context_length_exceeded"


def test_embeddings() -> None:
    engine = SimulatedEngine(_spec(kind="embedding"), NO_TIME)

    def embed(*inputs: Any) -> Any:
        body = {"input": list(inputs)}
        return engine.submit(EngineRequest(id="e", endpoint="/v1/embeddings", body=body)).result()

    result = embed("a", "b", "a", [1, 2, 3])
    assert result.vectors[0] == result.vectors[2] != result.vectors[1]
    assert math.isclose(math.hypot(*result.vectors[0]), 1)
    assert result.usage.input_tokens == 6
    for bad, code in (("", "invalid_request"), ("x" * 900, "context_length_exceeded")):
        with pytest.raises(EngineError) as refused:
            embed("fine", bad)
        assert (refused.value.code, refused.value.param) == (code, "input")


def test_neither_the_engine_nor_the_worker_around_it_imports_torch() -> None:
    code = (
        "import sys, workers.bootstrap, workers.engines.simulated, workers.__main__\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["classifier", "reranker"])
def test_no_verdicts_are_made_up(kind: str) -> None:
    engine = SimulatedEngine(_spec(kind=kind), NO_TIME)
    body = {"input": ["x"], "query": "x", "documents": ["x"]}
    with pytest.raises(EngineError, match="no verdicts") as refused:
        engine.submit(EngineRequest(id="e", endpoint="/v1/any", body=body))
    assert refused.value.param == "model"
