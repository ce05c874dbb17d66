"""OpenAI's stream format, built from a job's events and its final record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import orjson

from api.delivery import sse
from api.delivery.pieces import Piece
from broker.jobs import Job
from broker.pieces import chat_logprobs, completion_logprobs


class Chunks(Protocol):
    """One endpoint's way to write a stream."""

    def first(self) -> bytes:
        """Sent before any text; may be empty."""
        ...

    def text(self, text: str) -> bytes: ...

    def piece(self, piece: Piece) -> bytes:
        """The same where there are several answers or logprobs."""
        ...

    def end(self, job: Job) -> bytes:
        """Sent once the job is completed: finish reason, usage if wanted, `[DONE]`."""
        ...

    def full_text(self, job: Job) -> str:
        """All text of the completed job."""
        ...

    def full_pieces(self, job: Job) -> list[Piece]:
        """All answers of the completed job, one piece each."""
        ...


class _Writer(ABC):
    """What both formats share."""

    id_prefix: str
    object: str

    def __init__(
        self,
        job_id: str,
        *,
        created: int,
        model: str,
        include_usage: bool,
        tier: str | None,
        answers: int = 1,
    ) -> None:
        self._answers = answers
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

    @abstractmethod
    def _last_choice(self, index: int) -> dict[str, Any]: ...

    def end(self, job: Job) -> bytes:
        output = orjson.loads(job.output or b"{}")
        if "system_fingerprint" in output:
            self._head["system_fingerprint"] = output["system_fingerprint"]
        parts = []
        for index, choice in enumerate(output.get("choices") or [{}]):
            reason = choice.get("finish_reason", "stop")
            parts.append(self._chunk({**self._last_choice(index), "finish_reason": reason}))
        if self._include_usage:
            usage = {**self._head, "choices": [], "usage": output.get("usage")}
            parts.append(sse.data(orjson.dumps(usage)))
        parts.append(sse.DONE)
        return b"".join(parts)


class ChatChunks(_Writer):
    id_prefix = "chatcmpl-"
    object = "chat.completion.chunk"

    @staticmethod
    def _choice(delta: dict[str, str], index: int = 0) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _last_choice(self, index: int) -> dict[str, Any]:
        return self._choice({}, index)

    def first(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(self._choice(role, each)) for each in range(self._answers))

    def text(self, text: str) -> bytes:
        return self._chunk(self._choice({"content": text}))

    def piece(self, piece: Piece) -> bytes:
        choice = self._choice({"content": piece.text}, piece.answer)
        return self._chunk({**choice, "logprobs": chat_logprobs(piece.logprobs or None)})

    def full_text(self, job: Job) -> str:
        return self._text_of(_choices_of(job)[0])

    def full_pieces(self, job: Job) -> list[Piece]:
        return [
            Piece(index, self._text_of(choice), (choice.get("logprobs") or {}).get("content") or [])
            for index, choice in enumerate(_choices_of(job))
        ]

    @staticmethod
    def _text_of(choice: dict[str, Any]) -> str:
        return str(choice.get("message", {}).get("content") or "")


class CompletionChunks(_Writer):
    id_prefix = "cmpl-"
    object = "text_completion"

    @staticmethod
    def _choice(text: str, index: int = 0) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _last_choice(self, index: int) -> dict[str, Any]:
        return self._choice("", index)

    def first(self) -> bytes:
        return b""

    def text(self, text: str) -> bytes:
        return self._chunk(self._choice(text))

    def piece(self, piece: Piece) -> bytes:
        choice = self._choice(piece.text, piece.answer)
        logprobs = completion_logprobs(piece.logprobs or None, piece.offset)
        return self._chunk({**choice, "logprobs": logprobs})

    def full_text(self, job: Job) -> str:
        return str(_choices_of(job)[0].get("text") or "")

    def full_pieces(self, job: Job) -> list[Piece]:
        # The form of a completion's logprobs holds less than a piece's; all of them precede it.
        return [
            Piece(index, str(choice.get("text") or ""), [])
            for index, choice in enumerate(_choices_of(job))
        ]


def _choices_of(job: Job) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = orjson.loads(job.output or b"{}").get("choices") or [{}]
    return choices
