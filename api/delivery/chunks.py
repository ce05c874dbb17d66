"""OpenAI's stream format, built from a job's events and its final record."""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from api.delivery import sse
from broker.jobs import Job


class Chunks(Protocol):
    """One endpoint's way to write a stream."""

    def first(self) -> bytes:
        """Sent before any text; may be empty."""
        ...

    def text(self, text: str) -> bytes: ...

    def end(self, job: Job) -> bytes:
        """Sent once the job is completed: finish reason, usage if wanted, `[DONE]`."""
        ...

    def full_text(self, job: Job) -> str:
        """All text of the completed job."""
        ...


class _Writer:
    """What both formats share."""

    id_prefix: str
    object: str

    def __init__(
        self, job_id: str, *, created: int, model: str, include_usage: bool, tier: str | None
    ) -> None:
        self._head: dict[str, Any] = {
            "id": self.id_prefix + job_id.removeprefix("job_"),
            "object": self.object,
            "created": created,
            "model": model,
        }
        if tier is not None:
            self._head["service_tier"] = tier
        self._include_usage = include_usage
        #: All chunks but the last have a null usage when usage is wanted.
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return sse.data(orjson.dumps({**self._head, "choices": [choice], **self._tail}))

    def _end(self, job: Job, last_choice: dict[str, Any]) -> bytes:
        output = orjson.loads(job.output or b"{}")
        if "system_fingerprint" in output:
            self._head["system_fingerprint"] = output["system_fingerprint"]
        choices = output.get("choices") or [{}]
        last_choice["finish_reason"] = choices[0].get("finish_reason", "stop")
        parts = [self._chunk(last_choice)]
        if self._include_usage:
            usage = {**self._head, "choices": [], "usage": output.get("usage")}
            parts.append(sse.data(orjson.dumps(usage)))
        parts.append(sse.DONE)
        return b"".join(parts)


class ChatChunks(_Writer):
    id_prefix = "chatcmpl-"
    object = "chat.completion.chunk"

    @staticmethod
    def _choice(delta: dict[str, str]) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def first(self) -> bytes:
        return self._chunk(self._choice({"role": "assistant", "content": ""}))

    def text(self, text: str) -> bytes:
        return self._chunk(self._choice({"content": text}))

    def end(self, job: Job) -> bytes:
        return self._end(job, self._choice({}))

    def full_text(self, job: Job) -> str:
        return str(_choice_of(job).get("message", {}).get("content") or "")


class CompletionChunks(_Writer):
    id_prefix = "cmpl-"
    object = "text_completion"

    @staticmethod
    def _choice(text: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": None}

    def first(self) -> bytes:
        return b""

    def text(self, text: str) -> bytes:
        return self._chunk(self._choice(text))

    def end(self, job: Job) -> bytes:
        return self._end(job, self._choice(""))

    def full_text(self, job: Job) -> str:
        return str(_choice_of(job).get("text") or "")


def _choice_of(job: Job) -> dict[str, Any]:
    choices = orjson.loads(job.output or b"{}").get("choices") or [{}]
    choice: dict[str, Any] = choices[0]
    return choice
