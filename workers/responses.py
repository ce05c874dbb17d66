"""Response bodies in OpenAI's shape, as the API relays them."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import orjson

from broker.jobs import Job
from broker.pieces import chat_logprobs, completion_logprobs
from workers.engine import Choice, EngineResult

#: A response is a chat whose answer the API puts into another form.
_CHATS = ("/v1/chat/completions", "/v1/responses")
_EMBEDDINGS = "/v1/embeddings"
_MODERATIONS = "/v1/moderations"
_RERANK = "/v1/rerank"


def response_body(
    job: Job, body: dict[str, Any], result: EngineResult, *, simulated: bool = False
) -> bytes:
    """The complete response of a job as JSON; `body` is its request."""
    if job.endpoint == _EMBEDDINGS:
        content = _embeddings(job, result, base64_wanted=body.get("encoding_format") == "base64")
    elif job.endpoint == _MODERATIONS:
        content = _moderations(job, result)
    elif job.endpoint == _RERANK:
        content = _ranking(job, body, result)
    else:
        content = _completion(job, result)
    if simulated:
        content["system_fingerprint"] = "simulated"
    return orjson.dumps(content)


def _completion(job: Job, result: EngineResult) -> dict[str, Any]:
    name = job.id.removeprefix("job_")
    choices = [_choice(job, 0, result)]
    choices += [_choice(job, index, other) for index, other in enumerate(result.others, 1)]
    usage = result.usage
    return {
        "id": f"chatcmpl-{name}" if job.endpoint in _CHATS else f"cmpl-{name}",
        "object": "chat.completion" if job.endpoint in _CHATS else "text_completion",
        "created": job.created_ms // 1000,
        "model": job.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }


def _choice(job: Job, index: int, answer: EngineResult | Choice) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if job.endpoint in _CHATS:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        choice["logprobs"] = chat_logprobs(answer.logprobs)
    else:
        choice["text"] = answer.text
        choice["logprobs"] = completion_logprobs(answer.logprobs)
    choice["finish_reason"] = answer.finish_reason
    return choice


def _embeddings(job: Job, result: EngineResult, *, base64_wanted: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "model": job.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _packed(vector) if base64_wanted else vector,
            }
            for index, vector in enumerate(result.vectors)
        ],
        "usage": _input_only(result),
    }


def _moderations(job: Job, result: EngineResult) -> dict[str, Any]:
    return {
        "id": f"modr-{job.id.removeprefix('job_')}",
        "model": job.model,
        "results": [
            {
                "flagged": any(judgement.flags.values()),
                "categories": judgement.flags,
                "category_scores": judgement.scores,
                "category_applied_input_types": {label: ["text"] for label in judgement.flags},
            }
            for judgement in result.judgements
        ],
        "usage": _input_only(result),
    }


def _ranking(job: Job, body: dict[str, Any], result: EngineResult) -> dict[str, Any]:
    """The best first; documents that are as good stay in the caller's order."""
    scores = result.relevance
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.get("top_n")]
    ranked: list[dict[str, Any]] = [
        {"index": index, "relevance_score": scores[index]} for index in order
    ]
    if body.get("return_documents"):
        for each in ranked:
            each["document"] = {"text": body["documents"][each["index"]]}
    return {
        "id": f"rerank-{job.id.removeprefix('job_')}",
        "object": "list",
        "model": job.model,
        "results": ranked,
        "usage": _input_only(result),
    }


def _input_only(result: EngineResult) -> dict[str, int]:
    tokens = result.usage.input_tokens
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _packed(vector: Sequence[float]) -> str:
    """Base64 of little-endian float32, as OpenAI's SDK decodes it."""
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed).decode()
