"""A job's text as one growing string, over attempts that may start again from nothing."""

from __future__ import annotations

from api.delivery.following import Snapshot
from broker.jobs import Event, EventType


class DivergedError(Exception):
    """A new attempt says something else than what was already sent."""


class TextRelay:
    """Turns deltas into what still has to be sent.

    A repeated attempt has to say again what was sent before anything new goes out; when it says
    something else, what was sent can't be taken back and the stream has to end.
    """

    def __init__(self) -> None:
        self._sent: list[str] = []
        #: Attempt that the text comes from.
        self._attempt = 0
        #: Text of earlier attempts that this one has to repeat, and how far it has.
        self._replay = ""
        self._at = 0

    def take(self, item: Event | Snapshot) -> str:
        """The new text in an event. Raises `DivergedError`."""
        if isinstance(item, Snapshot):
            self._attempt = item.attempt
            return self.complete(item.text)
        if item.type is not EventType.DELTA or item.attempt < self._attempt:
            return ""
        if item.attempt > self._attempt:
            self._attempt, self._replay, self._at = item.attempt, "".join(self._sent), 0
        text = item.text
        if self._at < len(self._replay):
            expected = self._replay[self._at : self._at + len(text)]
            if not text.startswith(expected):
                raise DivergedError
            self._at += len(expected)
            text = text[len(expected) :]
        if text:
            self._sent.append(text)
        return text

    def complete(self, text: str) -> str:
        """What is missing up to `text`, which is all the text so far. Raises `DivergedError`."""
        sent = "".join(self._sent)
        if sent.startswith(text):
            rest = ""
        elif text.startswith(sent):
            rest = text[len(sent) :]
            self._sent.append(rest)
        else:
            raise DivergedError
        self._replay, self._at = "".join(self._sent), len(text)
        return rest
