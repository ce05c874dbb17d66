"""The continuous engine on a tiny random model: batching, cancelling, dying and coming back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config.catalogue import ModelSpec
from workers.engine import EngineError, EngineLostError, EngineRequest, RequestCancelledError
from workers.engines.continuous import ContinuousEngine

CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers that speaks bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _spec(folder: Path, **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "kind": "chat",
        "source": f"path:{folder}",
        "dtype": "float32",
        "context_tokens": CONTEXT,
        "max_batch": 4,
        "cache_tokens": 2048,
    }
    return ModelSpec.model_validate(fields | changes)


@pytest.fixture
def sizes() -> list[int]:
    """Requests of each step."""
    return []


@pytest.fixture
def engine(folder: Path, sizes: list[int]) -> Iterator[ContinuousEngine]:
    engine = ContinuousEngine(_spec(folder), folder, threads=1, on_step=sizes.append)
    engine.start()
    sizes.clear()
    yield engine
    engine.stop()


def _request(
    name: str, prompt: Any = "abc", on_text: Callable[[str], None] | None = None, **body: Any
) -> EngineRequest:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0} | body
    return EngineRequest(id=name, endpoint="/v1/completions", body=body, on_text=on_text)


def _long(name: str, started: threading.Event) -> EngineRequest:
    return _request(name, on_text=lambda _: started.set(), max_tokens=240)


def _open_end(engine: ContinuousEngine) -> None:
    """Let no answer end by itself."""
    # Held while the loop is rebuilt.
    with engine._lifecycle:
        assert engine._loop is not None
        engine._loop.generation_config.eos_token_id = -1


def test_requests_share_steps(engine: ContinuousEngine, sizes: list[int]) -> None:
    _open_end(engine)
    futures = [engine.submit(_request(f"job_{i}", f"prompt {i}")) for i in range(8)]
    assert [future.result(30).usage.output_tokens for future in futures] == [8] * 8
    # Four at a time, and never more.
    assert max(sizes) == 4
    assert len(sizes) <= 24
    assert engine.steps >= len(sizes)


def test_streamed_pieces_add_up_to_the_text(engine: ContinuousEngine) -> None:
    _open_end(engine)
    pieces: list[str] = []
    streamed = engine.submit(_request("job_1", on_text=pieces.append, max_tokens=60)).result(30)
    whole = engine.submit(_request("job_2", max_tokens=60)).result(30)
    assert "".join(pieces) == streamed.text == whole.text
    assert len(pieces) > 1
    assert streamed.finish_reason == "length"


def test_a_stop_string_ends_the_request_early(engine: ContinuousEngine) -> None:
    _open_end(engine)
    whole = engine.submit(_request("job_1", max_tokens=100)).result(30).text
    stop = whole[5:8]
    result = engine.submit(_request("job_2", max_tokens=100, stop=[stop])).result(30)
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert result.usage.output_tokens < 100


def test_an_end_token_ends_the_answer_and_is_not_shown(engine: ContinuousEngine) -> None:
    _open_end(engine)
    tokens = engine.submit(_request("job_1", max_tokens=20)).result(30)
    assert engine._loop is not None
    probe = engine._prompts.text(tokens.text[:1])[0]
    engine._loop.generation_config.eos_token_id = probe
    engine._ends = frozenset({probe})
    result = engine.submit(_request("job_2", max_tokens=20)).result(30)
    assert (result.finish_reason, result.usage.output_tokens) == ("stop", 1)


def test_samples_differ_and_greedy_ones_beside_them_do_not(engine: ContinuousEngine) -> None:
    _open_end(engine)
    alone = engine.submit(_request("job_0", max_tokens=30)).result(30).text
    sampled = [engine.submit(_request(f"job_{i}", max_tokens=30, temperature=1.5)) for i in (1, 2)]
    beside = engine.submit(_request("job_3", max_tokens=30))
    assert beside.result(30).text == alone
    assert len({alone, *(future.result(30).text for future in sampled)}) == 3


def test_cancel_frees_the_slot(engine: ContinuousEngine) -> None:
    _open_end(engine)
    events = [threading.Event() for _ in range(4)]
    running = [engine.submit(_long(f"job_{i}", event)) for i, event in enumerate(events)]
    for event in events:
        assert event.wait(30)
    waiting = engine.submit(_request("job_w", max_tokens=1))
    engine.cancel("job_0")
    engine.cancel("job_0")
    engine.cancel("job_unknown")
    with pytest.raises(RequestCancelledError) as cancelled:
        running[0].result(30)
    partial = cancelled.value.result
    assert partial.finish_reason == "cancelled"
    assert 0 < partial.usage.output_tokens < 240
    # The others still run, so the place is that of the cancelled one.
    assert waiting.result(30).usage.output_tokens == 1
    assert not any(future.done() for future in running[1:])
    for name in ("job_1", "job_2", "job_3"):
        engine.cancel(name)


def test_what_never_fits_is_refused_while_others_go_on(engine: ContinuousEngine) -> None:
    _open_end(engine)
    started = threading.Event()
    running = engine.submit(_long("job_1", started))
    assert started.wait(30)
    for name, bad in (
        ("job_2", _request("job_2", "x" * CONTEXT)),
        ("job_3", _request("job_3", "x" * 200, max_tokens=100)),
        ("job_4", _request("job_4", [5, 257])),
        ("job_5", _request("job_5", [])),
        ("job_6", _request("job_6", "")),
    ):
        with pytest.raises(EngineError):
            engine.submit(bad)
        engine.cancel(name)
    assert running.result(60).usage.output_tokens == 240


def test_more_than_the_cache_holds_at_once_still_finishes(folder: Path) -> None:
    engine = ContinuousEngine(_spec(folder, cache_tokens=288), folder, threads=1)
    engine.start()
    _open_end(engine)
    assert engine._limits.cache_tokens == 288
    futures = [engine.submit(_request(f"job_{i}", f"{i}" * 20, max_tokens=200)) for i in range(4)]
    assert [future.result(60).usage.output_tokens for future in futures] == [200] * 4
    engine.stop()


def test_a_shared_prefix_counts_as_cached(engine: ContinuousEngine) -> None:
    prompt = "y" * 70
    assert engine.submit(_request("job_1", prompt)).result(30).usage.cached_tokens == 0
    assert engine.submit(_request("job_2", prompt)).result(30).usage.cached_tokens == 64


def _break(engine: ContinuousEngine, error: BaseException) -> None:
    """Have the loop's next step raise."""

    def broken() -> bool:
        raise error

    assert engine._loop is not None
    engine._loop.batch_processor.prepare_next_batch = broken


def test_a_dead_loop_loses_its_requests_and_is_rebuilt(folder: Path) -> None:
    losses: list[bool] = []
    engine = ContinuousEngine(_spec(folder), folder, threads=1, on_lost=lambda: losses.append(True))
    engine.start()
    _open_end(engine)
    before = engine.submit(_request("job_0")).result(30)
    started = threading.Event()
    running = engine.submit(_long("job_1", started))
    assert started.wait(30)
    steps = engine.steps
    _break(engine, RuntimeError("No requests can be scheduled"))
    with pytest.raises(EngineLostError):
        running.result(30)
    assert losses == [True]
    # The next request may come while the loop is being rebuilt; it waits for it.
    again = engine.submit(_request("job_2")).result(30)
    assert again.text.startswith(before.text[:4])
    assert engine.alive
    assert engine.steps > steps
    engine.stop()


def test_out_of_memory_makes_the_next_loop_smaller(folder: Path) -> None:
    engine = ContinuousEngine(_spec(folder), folder, threads=1)
    engine.start()
    _open_end(engine)
    started = threading.Event()
    running = engine.submit(_long("job_1", started))
    assert started.wait(30)
    _break(engine, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(EngineLostError):
        running.result(30)
    assert engine.submit(_request("job_2")).result(30).usage.output_tokens > 0
    assert engine._loop is not None
    assert engine._loop.capacity_tokens == 1536
    engine.stop()


def test_a_smaller_loop_admits_less(folder: Path) -> None:
    """What can never be scheduled would end the loop, and in the end the process."""
    engine = ContinuousEngine(_spec(folder, cache_tokens=288), folder, threads=1)
    engine.start()
    _open_end(engine)
    started = threading.Event()
    running = engine.submit(_long("job_1", started))
    assert started.wait(30)
    _break(engine, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(EngineLostError):
        running.result(30)
    with pytest.raises(EngineError) as refused:
        engine.submit(_long("job_1", started))
    assert refused.value.code == "context_length_exceeded"
    assert engine.submit(_request("job_2")).result(30).usage.output_tokens > 0
    engine.stop()


def test_a_failing_answer_ends_and_frees_its_place(
    engine: ContinuousEngine, sizes: list[int]
) -> None:
    _open_end(engine)

    def fail(_: str) -> None:
        raise RuntimeError("can't take it")

    with pytest.raises(RuntimeError, match="can't take it"):
        engine.submit(_request("job_1", on_text=fail, max_tokens=240)).result(30)
    assert engine.submit(_request("job_2", max_tokens=60)).result(30).usage.output_tokens == 60
    assert sizes[-1] == 1


def test_an_answer_that_fails_at_its_end_ends(
    engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't finish")

    with monkeypatch.context() as patch:
        patch.setattr("workers.engines.answers.Answer.finish", fail)
        with pytest.raises(RuntimeError, match="can't finish"):
            engine.submit(_request("job_1")).result(10)
    assert engine.submit(_request("job_2")).result(30).usage.output_tokens > 0


def test_a_cancel_ends_an_answer_whatever_is_wrong_with_it(
    engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't cut")

    _open_end(engine)
    monkeypatch.setattr("workers.engines.answers.Answer.cut", fail)
    started = threading.Event()
    future = engine.submit(_long("job_1", started))
    assert started.wait(30)
    engine.cancel("job_1")
    with pytest.raises(RequestCancelledError):
        future.result(10)


def test_a_request_the_loop_refuses_leaves_nothing_behind(
    engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like a request that makes no progress: the engine would count as stalled."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr("workers.engines.batching.BatchingLoop.add", fail)
    with pytest.raises(RuntimeError, match="full"):
        engine.submit(_request("job_1"))
    assert engine._pulse().running == 0


def test_an_engine_that_keeps_dying_says_so(folder: Path) -> None:
    dead = threading.Event()
    engine = ContinuousEngine(_spec(folder), folder, threads=1, on_dead=dead.set)
    engine.start()
    for number in range(3):
        started = threading.Event()
        _open_end(engine)
        running = engine.submit(_long(f"job_{number}", started))
        assert started.wait(30)
        _break(engine, RuntimeError("again"))
        with pytest.raises(EngineLostError):
            running.result(30)
    assert dead.wait(30)
    assert not engine.alive
    with pytest.raises(EngineLostError):
        engine.submit(_request("job_9"))
    engine.stop()


def test_a_stuck_step_is_noticed(folder: Path) -> None:
    dead, release = threading.Event(), threading.Event()
    engine = ContinuousEngine(_spec(folder), folder, threads=1, stall_s=2.0, on_dead=dead.set)
    engine.start()
    _open_end(engine)
    started = threading.Event()
    running = engine.submit(_long("job_1", started))
    assert started.wait(30)
    assert engine._loop is not None
    processor = engine._loop.batch_processor
    prepare = processor.prepare_next_batch

    def stuck() -> bool:
        release.wait(30)
        return bool(prepare())

    processor.prepare_next_batch = stuck
    with pytest.raises(EngineLostError):
        running.result(30)
    # A thread inside the model can't be ended, so this process has to go.
    assert dead.wait(30)
    release.set()
    engine.stop()


# -- how tokens are drawn --------------------------------------------------------------------------
def test_a_seed_repeats_an_answer_alone_and_in_a_batch(engine: ContinuousEngine) -> None:
    _open_end(engine)
    body = {"max_tokens": 30, "temperature": 1.3, "top_p": 0.95}
    alone = engine.submit(_request("job_0", seed=11, **body)).result(30).text
    batch = [engine.submit(_request(f"job_{i}", f"other {i}", **body)) for i in (1, 2)]
    again = engine.submit(_request("job_3", seed=11, **body))
    assert again.result(30).text == alone
    assert {future.result(30).text for future in batch}.isdisjoint({alone})
    assert engine.submit(_request("job_4", seed=12, **body)).result(30).text != alone


def test_penalties_and_biases_belong_to_their_request(engine: ContinuousEngine) -> None:
    _open_end(engine)
    plain = engine.submit(_request("job_0", max_tokens=40)).result(30).text
    wanted = engine._prompts.text("Z")[0]
    biased = engine.submit(_request("job_1", max_tokens=5, logit_bias={str(wanted): 100}))
    varied = engine.submit(_request("job_2", max_tokens=40, repetition_penalty=50.0))
    beside = engine.submit(_request("job_3", max_tokens=40))
    assert biased.result(30).text == "ZZZZZ"
    assert beside.result(30).text == plain
    assert varied.result(30).text != plain


# -- among strangers -------------------------------------------------------------------------------
SPOILT = "\x07"


def _spoil(engine: ContinuousEngine) -> None:
    """Let prompts that hold `SPOILT` give scores that are no numbers."""
    token = engine._prompts.text(SPOILT)[0]
    with torch.no_grad():
        engine._model.get_input_embeddings().weight[token] = torch.nan


def test_scores_that_are_no_numbers_fail_their_request_only(engine: ContinuousEngine) -> None:
    _open_end(engine)
    _spoil(engine)
    body = {"max_tokens": 20, "logit_bias": {str(engine._prompts.text(SPOILT)[0]): -100}}
    alone = engine.submit(_request("job_0", **body)).result(30).text
    good = [engine.submit(_request(f"job_{i}", **body)) for i in (1, 2, 3)]
    with pytest.raises(EngineError) as failed:
        engine.submit(_request("job_4", "abc" + SPOILT)).result(30)
    assert failed.value.code == "internal_error"
    assert [future.result(30).text for future in good] == [alone] * 3
    assert engine.alive
    assert engine._losses == 0


def _break_off(_: str) -> None:
    raise RuntimeError("nobody reads along")


#: What strangers send; each hurts itself at most.
HOSTILE: list[dict[str, Any]] = [
    {"prompt": "abc" + SPOILT},
    {"prompt": [300]},
    {"prompt": [-1, 5]},
    {"prompt": [2**31 - 1]},
    {"prompt": ""},
    {"prompt": "x" * CONTEXT},
    {"prompt": "x" * 5000},
    {"max_tokens": 10**9},
    {"max_tokens": 0},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": 1e-300, "top_p": 1e-300},
    {"temperature": 2, "min_p": 1.0},
    {"temperature": 2, "top_k": 10**6, "seed": -(2**63)},
    {"seed": 2**70},
    {"repetition_penalty": 100.0, "presence_penalty": -2, "frequency_penalty": 2},
    {"logit_bias": {str(token): -100 for token in range(257)}},
    {"logit_bias": {"256": 100}},
    {"logit_bias": {"257": 1}},
    {"logit_bias": {"\u0661": 1}},
    {"stop": ["\ufffd", "\x00"]},
    {"stop": ["a"] * 5},
    {"stop": [""]},
    {"structured_outputs": {"regex": "(.{1,50}[aeiou]){1,500}x"}},
    {"structured_outputs": {"regex": r"[^\s\S]"}},
    {"structured_outputs": {"regex": "("}},
    {"response_format": {"type": "json_object"}, "logit_bias": {"90": -100}, "temperature": 2},
    {"n": 5, "logprobs": 20},
    {"n": 17},
    {"logprobs": 21},
    {"prompt": "abc", "on_text": _break_off},
    {"prompt": "abc", "max_tokens": 200, "cancel": True},
]


def test_a_thousand_hostile_requests_hurt_nobody_else(engine: ContinuousEngine) -> None:
    _open_end(engine)
    _spoil(engine)
    draw = random.Random(20261124)
    # No answer may hold the token that spoils.
    keep = {"logit_bias": {str(engine._prompts.text(SPOILT)[0]): -100}, "max_tokens": 12}
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.2, "seed": 5}, {"presence_penalty": 1.5}]
    expected = [
        engine.submit(_request(f"job_e{at}", **keep | way)).result(30).text
        for at, way in enumerate(ways)
    ]
    good = []
    bad = []
    refusals: set[str] = set()
    for number in range(1000):
        way = dict(draw.choice(HOSTILE))
        cancelled, on_text = way.pop("cancel", False), way.pop("on_text", None)
        name = f"job_h{number}"
        try:
            bad.append(engine.submit(_request(name, on_text=on_text, **{"max_tokens": 3} | way)))
        except EngineError as refusal:
            refusals.add(refusal.code)
        if cancelled:
            engine.cancel(name)
        if number % 10 == 0:
            which = draw.randrange(len(ways))
            request = _request(f"job_g{number}", **keep | ways[which])
            good.append((which, engine.submit(request)))
    for which, future in good:
        assert future.result(60).text == expected[which]
    for future in bad:
        # It ends one way or the other.
        future.exception(60)
    assert refusals == {"invalid_request", "context_length_exceeded"}
    assert engine._losses == 0
    assert len(good) == 100
