"""Response bodies in OpenAI's shape, as the API relays them."""

from __future__ import annotations

import base64
import struct
from typing import Any

import orjson

from broker.answers import chat_logprobs, completion_logprobs
from broker.jobs import Job
from workers.engine import Choice, EngineResult

#: A response is a chat whose answer the API puts into another form.
_CHATS = ("/v1/chat/completions", "/v1/responses")
_EMBEDDINGS = "/v1/embeddings"


def response_body(
    job: Job, body: dict[str, Any], result: EngineResult, *, simulated: bool = False
) -> bytes:
    """The complete response of a job as JSON; `body` is its request."""
    if job.endpoint == _EMBEDDINGS:
        content = _embeddings(job, result, base64_wanted=body.get("encoding_format") == "base64")
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
        "usage": {
            "prompt_tokens": result.usage.input_tokens,
            "total_tokens": result.usage.input_tokens,
        },
    }


def _packed(vector: list[float]) -> str:
    """Base64 of little-endian float32, as OpenAI's SDK decodes it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
