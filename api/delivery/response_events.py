"""A response as OpenAI's typed events, the same whichever process writes them.

`sequence_number` counts characters, not events: the head has the first few numbers, and a piece of
text has that of its last character. So a number says exactly how much of the text its reader has,
however the text was cut into pieces and whatever the event log still holds.
"""

from __future__ import annotations

from typing import Any

import orjson

from api.schemas.response_object import (
    is_cut,
    message_id,
    output_item,
    output_text,
    parts_of,
    response_object,
    text_part,
)
from broker.jobs import Job, Status


class ResponseEvents:
    """What has to be sent of one response to a reader that has all up to number `after`."""

    def __init__(self, job: Job, *, after: int = -1) -> None:
        self._job = job
        self._after = after
        self._item_id = message_id(job.id)
        background = parts_of(job)[1]["background"]
        #: Number of the event that says it runs; one is between, that a background one waits.
        self._running = 2 if background else 1
        #: Number of the first character.
        self._text = self._running + 3
        #: Characters that went by, sent or not.
        self._at = 0
        self._started = False

    def opening(self) -> bytes:
        waiting = response_object(self._job, pending="queued")
        created = self._event(0, "response.created", response=waiting)
        if self._running == 1:
            return created
        return created + self._event(1, "response.queued", response=waiting)

    def start(self) -> bytes:
        """The job runs; nothing when that was said."""
        if self._started:
            return b""
        self._started = True
        running = response_object(self._job, pending="in_progress")
        item = output_item(self._job.id, None, "in_progress")
        part: dict[str, Any] = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return (
            self._event(self._running, "response.in_progress", response=running)
            + self._event(
                self._running + 1, "response.output_item.added", output_index=0, item=item
            )
            + self._event(
                self._running + 2, "response.content_part.added", **part, part=text_part("")
            )
        )

    def text(self, piece: str) -> bytes:
        """More text; what the reader has of it is left out."""
        known = self._after + 1 - self._text - self._at
        self._at += len(piece)
        fresh = piece[known:] if known > 0 else piece
        if not fresh:
            return b""
        return self._event(
            self._text + self._at - 1,
            "response.output_text.delta",
            item_id=self._item_id,
            output_index=0,
            content_index=0,
            delta=fresh,
            logprobs=[],
        )

    def end(self, job: Job) -> bytes:
        """How the job ended; all its text must have gone by."""
        number, sent = self._text + self._at, b""
        if job.status is Status.COMPLETED:
            kind = "incomplete" if is_cut(job) else "completed"
            text = output_text(job)
            place: dict[str, Any] = {"output_index": 0, "content_index": 0}
            sent = (
                self._event(
                    number,
                    "response.output_text.done",
                    item_id=self._item_id,
                    **place,
                    text=text,
                    logprobs=[],
                )
                + self._event(
                    number + 1,
                    "response.content_part.done",
                    item_id=self._item_id,
                    **place,
                    part=text_part(text),
                )
                + self._event(
                    number + 2,
                    "response.output_item.done",
                    output_index=0,
                    item=output_item(job.id, text, kind),
                )
            )
        else:
            kind = "cancelled" if job.status is Status.CANCELLED else "failed"
        return sent + self._event(number + 3, f"response.{kind}", response=response_object(job))

    def broken(self, code: str, message: str) -> bytes:
        """The stream can't go on."""
        number = self._text + self._at + 3
        return self._event(number, "error", code=code, message=message, param=None)

    def _event(self, number: int, name: str, **fields: Any) -> bytes:
        if number <= self._after:
            return b""
        payload = orjson.dumps({"type": name, **fields, "sequence_number": number})
        return b"event: %b\ndata: %b\n\n" % (name.encode(), payload)
