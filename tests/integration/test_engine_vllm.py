"""The contract of an engine, kept by vLLM where it is installed (`make test-vllm` installs it)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.integration.real_models import real_model
from workers.engine import EngineError, EngineRequest, EngineResult, RequestCancelledError

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def _chat(name: str, text: str = "What is the capital of France?", **body: object) -> EngineRequest:
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": 24, "temperature": 0} | body
    return EngineRequest(id=name, endpoint="/v1/chat/completions", body=body)


@pytest.fixture(scope="module")
def engine() -> Iterator[object]:
    from workers.engines.vllm import VllmEngine

    loaded = threading.Event()
    spec, folder = real_model("smollm2-135m", engine="vllm", max_batch=16, dtype="float32")
    made = VllmEngine(spec, folder, eager=True, on_loaded=loaded.set)
    made.start()
    assert loaded.is_set()
    yield made
    made.stop()
    assert not made.alive
    with pytest.raises(Exception, match="stopped"):
        made.submit(_chat("job_late"))


def _run(engine, request: EngineRequest) -> EngineResult:  # type: ignore[no-untyped-def]
    result: EngineResult = engine.submit(request).result(120)
    return result


def test_greedy_alone_and_among_others(engine) -> None:  # type: ignore[no-untyped-def]
    alone = _run(engine, _chat("job_a"))
    assert "Paris" in alone.text
    assert alone.usage.input_tokens > 10
    assert 0 < alone.usage.output_tokens <= 24
    others = [engine.submit(_chat(f"job_{n}", "Tell me a story.", temperature=1)) for n in range(8)]
    assert _run(engine, _chat("job_b")).text == alone.text
    assert len({future.result(120).text for future in others}) > 1
    before = engine.steps
    assert before > 0
    _run(engine, _chat("job_c", max_tokens=1))
    assert engine.steps > before


def test_text_comes_in_pieces_and_ends_at_a_stop_string(engine) -> None:  # type: ignore[no-untyped-def]
    whole = _run(engine, _chat("job_w", "Count from one to ten.", max_tokens=40))
    pieces: list[str] = []
    request = _chat("job_s", "Count from one to ten.", max_tokens=40)
    streamed = _run(
        engine,
        EngineRequest(
            id="job_s", endpoint=request.endpoint, body=request.body, on_text=pieces.append
        ),
    )
    assert streamed.text == whole.text == "".join(pieces)
    assert len(pieces) > 1
    stop = whole.text[8:12]
    cut = _run(engine, _chat("job_t", "Count from one to ten.", max_tokens=40, stop=[stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.finish_reason in ("length", "stop")
    assert _run(engine, _chat("job_l", max_tokens=2)).finish_reason == "length"


def test_a_cancelled_request_tells_what_it_has(engine) -> None:  # type: ignore[no-untyped-def]
    begun = threading.Event()
    request = _chat("job_x", "Write a very long story.", max_tokens=900)
    future = engine.submit(
        EngineRequest(
            id="job_x",
            endpoint=request.endpoint,
            body=request.body,
            on_text=lambda _: begun.set(),
        )
    )
    assert begun.wait(120)
    engine.cancel("job_x")
    with pytest.raises(RequestCancelledError) as stopped:
        future.result(30)
    assert stopped.value.result.text
    assert stopped.value.result.usage.output_tokens < 900
    engine.cancel("job_unknown")


def test_a_seed_repeats(engine) -> None:  # type: ignore[no-untyped-def]
    texts = {_run(engine, _chat(f"job_{n}", temperature=1.2, seed=-7)).text for n in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"max_tokens": 5000}, "invalid_request"),
        ({"messages": [{"role": "user", "content": "river " * 3000}]}, "context_length_exceeded"),
        ({"temperature": 9}, "invalid_request"),
        ({"logit_bias": {"99999999": 1}}, "invalid_request"),
    ],
)
def test_what_cannot_run_hurts_nobody(engine, body: dict[str, object], code: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineError) as refused:
        engine.submit(_chat("job_bad", **body))
    assert refused.value.code == code
    assert _run(engine, _chat("job_good", max_tokens=2)).usage.output_tokens == 2
