"""Response bodies, as OpenAI's SDK reads them."""

from __future__ import annotations

import base64
import struct
from typing import Any

import orjson
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from broker.jobs import Band, Job, Status, Usage
from workers.engine import EngineResult, Judgement
from workers.responses import response_body


def _job(endpoint: str) -> Job:
    return Job(
        id="job_abc",
        tenant="t",
        key_id="",
        model="smollm2-135m",
        endpoint=endpoint,
        band=Band.STANDARD,
        status=Status.IN_PROGRESS,
        cost=1,
        body=b"{}",
        metadata=b"{}",
        stream=False,
        attempt=1,
        max_attempts=3,
        created_ms=1_700_000_123_456,
        started_ms=0,
        finished_ms=0,
        result_ttl_s=60,
        request_id="",
        seq=1,
        output=None,
        error=None,
        usage=Usage(),
    )


RESULT = EngineResult(
    text="Grüße 😀",
    finish_reason="length",
    usage=Usage(input_tokens=7, output_tokens=3, cached_tokens=4),
)


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses"])
def test_chat(endpoint: str) -> None:
    raw = response_body(_job(endpoint), {}, RESULT)
    body = ChatCompletion.model_validate_json(raw, strict=True)
    assert (body.id, body.created, body.object) == (
        "chatcmpl-abc",
        1_700_000_123,
        "chat.completion",
    )
    assert body.choices[0].message.content == "Grüße 😀"
    assert body.choices[0].finish_reason == "length"
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (7, 3)
    assert body.usage.total_tokens == 10
    assert body.usage.prompt_tokens_details is not None
    assert body.usage.prompt_tokens_details.cached_tokens == 4
    assert "system_fingerprint" not in orjson.loads(raw)


def test_completion_of_the_simulated_engine_says_so() -> None:
    raw = response_body(_job("/v1/completions"), {}, RESULT, simulated=True)
    body = Completion.model_validate_json(raw)
    assert (body.id, body.object, body.choices[0].text) == (
        "cmpl-abc",
        "text_completion",
        "Grüße 😀",
    )
    assert body.system_fingerprint == "simulated"


VECTORS = [[0.5, -0.25], [1.0, 0.0]]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings(form: str) -> None:
    result = EngineResult(vectors=VECTORS, usage=Usage(input_tokens=6))
    raw = response_body(_job("/v1/embeddings"), {"encoding_format": form}, result)
    body: dict[str, Any] = orjson.loads(raw)
    if form == "float":
        parsed = CreateEmbeddingResponse.model_validate_json(raw)
        vectors = [item.embedding for item in parsed.data]
    else:
        packed = [base64.b64decode(item["embedding"]) for item in body["data"]]
        vectors = [list(struct.unpack("<2f", part)) for part in packed]
    assert vectors == VECTORS
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


def test_moderations() -> None:
    judgements = [
        Judgement({"insult": 0.75, "threat": 0.25}, {"insult": True, "threat": False}),
        Judgement({"insult": 0.0, "threat": 0.0}, {"insult": False, "threat": False}),
    ]
    result = EngineResult(judgements=judgements, usage=Usage(input_tokens=6))
    body = orjson.loads(response_body(_job("/v1/moderations"), {}, result))
    assert (body["id"], body["model"]) == ("modr-abc", "smollm2-135m")
    assert [row["flagged"] for row in body["results"]] == [True, False]
    first = body["results"][0]
    assert first["categories"] == {"insult": True, "threat": False}
    assert first["category_scores"] == {"insult": 0.75, "threat": 0.25}
    assert first["category_applied_input_types"] == {"insult": ["text"], "threat": ["text"]}


def test_ranking() -> None:
    result = EngineResult(relevance=[0.25, 0.75, 0.25, 0.5], usage=Usage(input_tokens=6))
    request = {"documents": ["a", "b", "c", "d"], "top_n": 3, "return_documents": True}
    body = orjson.loads(response_body(_job("/v1/rerank"), request, result))
    assert body["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "b"}},
        {"index": 3, "relevance_score": 0.5, "document": {"text": "d"}},
        # As good as the third document, and earlier.
        {"index": 0, "relevance_score": 0.25, "document": {"text": "a"}},
    ]
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    plain = orjson.loads(response_body(_job("/v1/rerank"), {"documents": ["a"] * 4}, result))
    assert [each["index"] for each in plain["results"]] == [1, 3, 0, 2]
    assert "document" not in plain["results"][0]
