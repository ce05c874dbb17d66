"""A job of `/v1/responses` as OpenAI's response object, its items, and what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from api.schemas.fields import TIER_OF
from api.schemas.responses import ENDPOINT, ItemListing, Message
from broker.jobs import Job, JobError, Status

_ID: Final = re.compile(r"resp_([0-9a-hjkmnp-tv-z]{26})", re.ASCII)
_STATUSES: Final[Mapping[Status, str]] = {
    Status.QUEUED: "queued",
    Status.IN_PROGRESS: "in_progress",
    Status.CANCELLING: "in_progress",
    Status.COMPLETED: "completed",
    Status.FAILED: "failed",
    Status.EXPIRED: "failed",
    Status.CANCELLED: "cancelled",
}
#: A job that ended without a word of its own.
_EXPIRED: Final = JobError(code="deadline_exceeded", message="The job did not finish in time.")


def response_id(job_id: str) -> str:
    return "resp_" + job_id.removeprefix("job_")


def job_id_for(response: str) -> str | None:
    """The job behind a response's id; None for what can't be one."""
    found = _ID.fullmatch(response)
    return "job_" + found[1] if found else None


def message_id(job_id: str, number: int | None = None) -> str:
    """Of a response's output, or with a number of one of its inputs."""
    name = "msg_" + job_id.removeprefix("job_")
    return name if number is None else f"{name}_{number}"


def output_text(job: Job) -> str:
    """All text of a job that has ended."""
    choices = orjson.loads(job.output or b"{}").get("choices") or [{}]
    return str(choices[0].get("message", {}).get("content") or "")


def is_cut(job: Job) -> bool:
    """Whether the text ends where the token limit was reached."""
    choices = orjson.loads(job.output or b"{}").get("choices") or [{}]
    return bool(choices[0].get("finish_reason") == "length")


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def output_item(job_id: str, text: str | None, status: str) -> dict[str, Any]:
    """The one message of a response; without content while there is none."""
    return {
        "id": message_id(job_id),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if text is None else [text_part(text)],
    }


def input_item(item_id: str, message: Message) -> dict[str, Any]:
    """A message of the caller as an item."""
    if message["role"] == "assistant":
        part = text_part(message["content"])
    else:
        part = {"type": "input_text", "text": message["content"]}
    return {
        "id": item_id,
        "type": "message",
        "status": "completed",
        "role": message["role"],
        "content": [part],
    }


def input_items(job: Job) -> list[dict[str, Any]]:
    """What the request itself said, in order."""
    messages, own = parts_of(job)
    first = len(messages) - own["inputs"]
    return [
        input_item(message_id(job.id, number), message)
        for number, message in enumerate(messages[first:])
    ]


def parts_of(job: Job) -> tuple[list[Message], dict[str, Any]]:
    """All messages of the job, and what only the API knows of it."""
    body = orjson.loads(job.body)
    return body["messages"], body["response"]


def history_after(job: Job) -> list[Message]:
    """What a next response has to know: all that was said, without this one's instructions."""
    messages, own = parts_of(job)
    said = messages[1:] if own["instructions"] else messages
    return [*said, {"role": "assistant", "content": output_text(job)}]


def response_object(job: Job, *, pending: str | None = None) -> dict[str, Any]:
    """For `orjson.dumps`; with `pending`, as it was when it had that status."""
    body = orjson.loads(job.body)
    own = body["response"]
    cut = job.status is Status.COMPLETED and is_cut(job)
    status = pending or ("incomplete" if cut else _STATUSES[job.status])
    ended = job.is_terminal and pending is None
    error, usage, output = None, None, []
    if ended:
        failed = job.error or (_EXPIRED if job.status is Status.EXPIRED else None)
        if failed is not None:
            error = {"code": failed.code, "message": failed.message}
        if job.output is not None:
            state = "completed" if status == "completed" else "incomplete"
            output = [output_item(job.id, output_text(job), state)]
        usage = {
            "input_tokens": job.usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": job.usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": job.usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.usage.total_tokens,
        }
    conversation = own["conversation"]
    return {
        "id": response_id(job.id),
        "object": "response",
        "created_at": job.created_ms // 1000,
        "completed_at": job.finished_ms // 1000 if ended else None,
        "status": status,
        "background": own["background"],
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if cut and ended else None,
        "instructions": own["instructions"],
        "max_output_tokens": body.get("max_tokens"),
        "model": job.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": own["previous_response_id"],
        "conversation": {"id": conversation} if conversation else None,
        "service_tier": TIER_OF[job.band],
        "store": own["store"],
        "temperature": body.get("temperature"),
        "text": {"format": _text_format(body.get("response_format"))},
        "tool_choice": "auto",
        "tools": [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "usage": usage,
        "user": body.get("user"),
        "metadata": orjson.Fragment(job.metadata),
    }


def _text_format(chat_format: dict[str, Any] | None) -> dict[str, Any]:
    """As it was asked for."""
    if chat_format is None:
        return {"type": "text"}
    return {"type": chat_format["type"], **chat_format.get("json_schema", {})}


def is_response(job: Job) -> bool:
    return job.endpoint == ENDPOINT and bool(job.body)


def item_page(items: list[dict[str, Any]], wanted: ItemListing) -> dict[str, Any] | None:
    """A page of items that come oldest first; None when `after` is none of them."""
    if wanted.order == "desc":
        items = items[::-1]
    if wanted.after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == wanted.after]
        if not places:
            return None
        items = items[places[0] + 1 :]
    page = items[: wanted.limit]
    return {
        "object": "list",
        "data": page,
        "has_more": len(items) > wanted.limit,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
