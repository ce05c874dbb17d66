"""The embedding engine on a real model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.integration.real_models import real_model
from workers.engine import EngineError, EngineLostError, EngineRequest, RequestCancelledError
from workers.engines.encoder import EncoderEngine

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def exact() -> Iterator[EncoderEngine]:
    """In float32."""
    yield from _started(dtype="float32")


@pytest.fixture(scope="module")
def engine() -> Iterator[EncoderEngine]:
    """In what the hardware is quickest with."""
    yield from _started()


def _started(**changes: object) -> Iterator[EncoderEngine]:
    engine = EncoderEngine(*real_model("all-minilm-l6-v2", **changes), threads=1)
    engine.start()
    yield engine
    engine.stop()


def _request(*inputs: Any, name: str = "job_e", **body: Any) -> EngineRequest:
    return EngineRequest(id=name, endpoint="/v1/embeddings", body={"input": list(inputs)} | body)


def _cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


SENTENCES = (
    "A cat sits on the mat.",
    "A kitten lies on the rug.",
    "Stock markets fell sharply on Monday after the central bank raised rates again.",
    "Rivers",
)


def test_related_sentences_are_nearer(engine: EncoderEngine) -> None:
    vectors = engine.submit(_request(*SENTENCES)).result(60).vectors
    assert [len(vector) for vector in vectors] == [384] * 4
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-5) for vector in vectors)
    assert _cosine(vectors[0], vectors[1]) > 0.5 > _cosine(vectors[0], vectors[2])


def test_the_company_in_a_batch_changes_nothing(exact: EncoderEngine) -> None:
    together = exact.submit(_request(*SENTENCES)).result(60).vectors
    for sentence, vector in zip(SENTENCES, together, strict=True):
        alone = exact.submit(_request(sentence)).result(60).vectors[0]
        assert alone == pytest.approx(vector, abs=1e-5)


def test_reduced_precision_stays_near(exact: EncoderEngine, engine: EncoderEngine) -> None:
    reference = exact.submit(_request(*SENTENCES)).result(60).vectors
    reduced = engine.submit(_request(*SENTENCES)).result(60).vectors
    for one, other in zip(reference, reduced, strict=True):
        assert _cosine(one, other) >= 0.999


def test_neither_company_nor_order_bends_a_vector(engine: EncoderEngine) -> None:
    """In what the hardware is quickest with, each batch of another shape."""
    texts = [" ".join(SENTENCES[: 1 + number % 4]) + f" {number}" for number in range(40)]
    together = engine.submit(_request(*texts)).result(60).vectors
    turned = engine.submit(_request(*reversed(texts))).result(60).vectors
    for text, one, other in zip(texts, together, reversed(turned), strict=True):
        alone = engine.submit(_request(text)).result(60).vectors[0]
        assert _cosine(one, alone) >= 0.9999
        assert _cosine(other, alone) >= 0.9999


def test_shorter_vectors_where_they_are_asked_for(exact: EncoderEngine) -> None:
    whole = exact.submit(_request(SENTENCES[0])).result(60).vectors[0]
    short = exact.submit(_request(SENTENCES[0], dimensions=64)).result(60).vectors[0]
    length = math.hypot(*whole[:64])
    assert list(short) == pytest.approx([each / length for each in whole[:64]], abs=1e-6)
    with pytest.raises(EngineError) as refused:
        exact.submit(_request(SENTENCES[0], dimensions=385)).result(60)
    assert (refused.value.code, refused.value.param) == ("invalid_request", "dimensions")


def test_long_texts_are_cut_when_asked(exact: EncoderEngine) -> None:
    cut = exact.submit(_request("word " * 300, truncate=True)).result(60)
    assert cut.usage.input_tokens == 256
    kept = exact.submit(_request("word " * 254)).result(60)
    assert list(cut.vectors[0]) == list(kept.vectors[0])


def test_vectors_are_the_mean_of_the_token_vectors(exact: EncoderEngine) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = real_model("all-minilm-l6-v2")[1]
    tokens = AutoTokenizer.from_pretrained(folder)([SENTENCES[2]], return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).tolist()
    result = exact.submit(_request(SENTENCES[2])).result(60)
    assert result.vectors[0] == pytest.approx(expected, abs=1e-5)
    assert result.usage.input_tokens == tokens["input_ids"].shape[1]


def test_text_and_its_tokens_give_the_same_vector(exact: EncoderEngine) -> None:
    tokens = exact._head.texts.plain(SENTENCES[0])
    by_text, by_tokens = (
        exact.submit(_request(item)).result(60).vectors[0] for item in (SENTENCES[0], tokens)
    )
    assert list(by_text) == list(by_tokens)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("word " * 300, "context_length_exceeded"),
        ("", "invalid_request"),
        ([], "invalid_request"),
        ([10**6], "invalid_request"),
    ],
)
def test_nothing_is_cut_short_unseen(engine: EncoderEngine, bad: Any, code: str) -> None:
    with pytest.raises(EngineError) as refused:
        engine.submit(_request("fine", bad))
    assert (refused.value.code, refused.value.param) == (code, "input")


def test_control_tokens_typed_by_users_are_text(engine: EncoderEngine) -> None:
    assert not {101, 102} & set(engine._head.texts.plain("[CLS] hello [SEP]"))


def test_many_requests_at_once_share_batches(engine: EncoderEngine) -> None:
    before = engine.steps
    futures = [engine.submit(_request(f"sentence number {i}", name=f"job_{i}")) for i in range(64)]
    assert all(len(future.result(60).vectors) == 1 for future in futures)
    assert engine.steps - before < 64


def test_cancel_and_stop() -> None:
    engine = EncoderEngine(*real_model("all-minilm-l6-v2"), threads=1)
    engine.start()
    futures = [engine.submit(_request(*["long " * 200] * 200, name=f"job_{i}")) for i in range(2)]
    engine.cancel("job_1")
    with pytest.raises(RequestCancelledError):
        futures[1].result(60)
    engine.stop()
    with pytest.raises(EngineLostError):
        futures[0].result(60)
    with pytest.raises(EngineLostError):
        engine.submit(_request("late"))
    assert not engine.alive
