"""Classification and reranking on small real checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from config.catalogue import ModelSpec
from config.settings import Models
from tests.integration.tiny_encoders import CONTEXT, entry, make_checkpoint
from workers.engine import EngineError, EngineRequest, EngineResult
from workers.engines.encoder import EncoderEngine
from workers.sources import ensure

TEXTS = (
    "a river runs to the sea",
    "stop it",
    "who would say such a thing to a friend",
    "x",
    "water waits before it enters",
)
LABELS = ("neutral", "insult", "threat")
FLOAT32 = {"dtype": "float32"}


class Running:
    """Engines that are stopped in the end."""

    def __init__(self) -> None:
        self._engines: list[EncoderEngine] = []

    def start(self, spec: ModelSpec) -> EncoderEngine:
        engine = EncoderEngine(spec, ensure(spec, Models()), threads=2)
        self._engines.append(engine)
        engine.start()
        return engine

    def stop(self) -> None:
        for engine in self._engines:
            engine.stop()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("labelled"), LABELS)


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cross"), ("relevance",), seed=3)


@pytest.fixture(scope="module")
def classifier(running: Running, labelled: Path) -> EncoderEngine:
    return running.start(entry(labelled, "classifier", **FLOAT32))


@pytest.fixture(scope="module")
def reranker(running: Running, cross: Path) -> EncoderEngine:
    return running.start(entry(cross, "reranker", **FLOAT32))


def _ask(engine: EncoderEngine, name: str = "job_1", **body: Any) -> EngineResult:
    return engine.submit(EngineRequest(id=name, endpoint="", body=body)).result(60)


def _scores(engine: EncoderEngine, *texts: str, **body: Any) -> list[list[float]]:
    judgements = _ask(engine, input=list(texts), **body).judgements
    return [list(judgement.scores.values()) for judgement in judgements]


def _logits(folder: Path, *texts: Any) -> torch.Tensor:
    """What transformers alone makes of it, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        each = [
            model(**tokenizer(*(text if isinstance(text, tuple) else (text,)), return_tensors="pt"))
            for text in texts
        ]
    return torch.cat([output.logits for output in each])


def test_scores_are_those_of_the_library(classifier: EncoderEngine, labelled: Path) -> None:
    expected = torch.softmax(_logits(labelled, *TEXTS), dim=-1)
    found = _ask(classifier, input=list(TEXTS))
    for judgement, row in zip(found.judgements, expected.tolist(), strict=True):
        assert list(judgement.scores) == list(LABELS)
        assert list(judgement.scores.values()) == pytest.approx(row, abs=1e-5)
        assert judgement.flags == {label: score >= 0.5 for label, score in judgement.scores.items()}
    # Random as the weights are, the texts are told apart.
    assert len({tuple(judgement.flags.values()) for judgement in found.judgements}) > 1
    tokens = AutoTokenizer.from_pretrained(labelled)(list(TEXTS))["input_ids"]
    assert found.usage.input_tokens == sum(map(len, tokens))


def test_neither_company_nor_order_changes_a_verdict(classifier: EncoderEngine) -> None:
    alone = {text: _scores(classifier, text)[0] for text in TEXTS}
    order = list(TEXTS) * 3
    random.Random(1).shuffle(order)
    for text, row in zip(order, _scores(classifier, *order), strict=True):
        assert row == pytest.approx(alone[text], abs=1e-5)


def test_labels_can_be_independent(running: Running, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, LABELS, problem="multi_label_classification", seed=5)
    spec = entry(folder, "classifier", threshold=0.9, thresholds={"insult": 0.0}, **FLOAT32)
    found = _ask(running.start(spec), input=list(TEXTS)).judgements
    expected = torch.sigmoid(_logits(folder, *TEXTS)).tolist()
    for judgement, row in zip(found, expected, strict=True):
        assert list(judgement.scores.values()) == pytest.approx(row, abs=1e-5)
        assert judgement.flags["insult"]
        assert judgement.flags["threat"] == (judgement.scores["threat"] >= 0.9)


def test_harmless_labels_are_no_category(running: Running, labelled: Path) -> None:
    engine = running.start(entry(labelled, "classifier", harmless=["neutral"], **FLOAT32))
    assert list(_ask(engine, input=["stop it"]).judgements[0].scores) == ["insult", "threat"]


@pytest.mark.parametrize(
    "fields", [{"harmless": ["kind"]}, {"thresholds": {"kind": 0.5}}, {"harmless": list(LABELS)}]
)
def test_labels_of_another_model_stop_the_start(labelled: Path, fields: Any) -> None:
    with pytest.raises(ValueError, match="which are neutral, insult, threat"):
        EncoderEngine(entry(labelled, "classifier", **fields), labelled).start()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_other_precisions_stay_near(
    running: Running, classifier: EncoderEngine, labelled: Path, dtype: str
) -> None:
    reduced = running.start(entry(labelled, "classifier", dtype=dtype))
    for one, other in zip(_scores(classifier, *TEXTS), _scores(reduced, *TEXTS), strict=True):
        assert one == pytest.approx(other, abs=0.05)


def test_long_texts_are_refused_or_cut_as_asked(classifier: EncoderEngine) -> None:
    long = "a b c d e f g h " * 20
    with pytest.raises(EngineError) as refused:
        _ask(classifier, input=["fine", long])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    assert "input 1 has 162 tokens; the model takes 48" in str(refused.value)
    cut = _ask(classifier, input=[long], truncate=True)
    assert cut.usage.input_tokens == CONTEXT
    kept = " ".join(long.split()[: CONTEXT - 2])
    assert list(cut.judgements[0].scores.values()) == _scores(classifier, kept)[0]


# -- reranking -------------------------------------------------------------------------------------
def test_relevance_is_that_of_the_library(reranker: EncoderEngine, cross: Path) -> None:
    pairs = [("what is a lake", text) for text in TEXTS]
    expected = torch.sigmoid(_logits(cross, *pairs))[:, 0].tolist()
    found = _ask(reranker, query="what is a lake", documents=list(TEXTS))
    assert found.relevance == pytest.approx(expected, abs=1e-5)
    assert max(found.relevance) - min(found.relevance) > 0.01
    tokens = [AutoTokenizer.from_pretrained(cross)(*pair)["input_ids"] for pair in pairs]
    assert found.usage.input_tokens == sum(map(len, tokens))


def test_the_query_is_not_the_document(reranker: EncoderEngine) -> None:
    there = _ask(reranker, query=TEXTS[0], documents=[TEXTS[1]]).relevance
    back = _ask(reranker, query=TEXTS[1], documents=[TEXTS[0]]).relevance
    assert there != pytest.approx(back, abs=1e-4)


def test_the_order_of_documents_changes_no_score(reranker: EncoderEngine) -> None:
    forth = _ask(reranker, query="sea", documents=list(TEXTS)).relevance
    back = _ask(reranker, query="sea", documents=list(reversed(TEXTS))).relevance
    assert list(reversed(back)) == pytest.approx(list(forth), abs=1e-5)
    alone = [_ask(reranker, query="sea", documents=[text]).relevance[0] for text in TEXTS]
    assert alone == pytest.approx(list(forth), abs=1e-5)


def test_only_documents_are_cut(reranker: EncoderEngine) -> None:
    long = "a b c d e f g h " * 20
    with pytest.raises(EngineError, match="document 1 with its query has") as refused:
        _ask(reranker, query="sea", documents=["x", long])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "documents")
    cut = _ask(reranker, query="sea", documents=[long], truncate=True)
    assert cut.usage.input_tokens == CONTEXT
    with pytest.raises(EngineError, match="leaves no room") as refused:
        _ask(reranker, query=long, documents=["x"], truncate=True)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "query")


def test_a_reranker_has_one_output(labelled: Path) -> None:
    with pytest.raises(ValueError, match="this model has 3"):
        EncoderEngine(entry(labelled, "reranker"), labelled).start()


def test_a_checkpoint_without_its_head_gives_no_verdicts(tmp_path: Path, labelled: Path) -> None:
    """transformers would fill in random weights."""
    config = BertConfig.from_pretrained(labelled)
    BertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(labelled).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks classifier\.bias"):
        EncoderEngine(entry(tmp_path, "classifier"), tmp_path).start()


def test_the_own_forward_pass_is_that_of_the_library(labelled: Path) -> None:
    """Padded and not, with types of tokens and without."""
    from workers.engines.bert import Bert, suits

    model = AutoModel.from_pretrained(labelled).eval()
    assert suits(model)
    ids = torch.randint(4, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    types = torch.zeros_like(ids)
    types[:, 5:] = 1
    with torch.inference_mode():
        for seen, kinds in ((None, None), (None, types), (mask, None), (mask, types)):
            expected = model(
                input_ids=ids, attention_mask=seen, token_type_ids=kinds
            ).last_hidden_state
            found = Bert(model)(ids, seen, kinds)
            real = (mask if seen is not None else torch.ones_like(ids)).bool()
            torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
