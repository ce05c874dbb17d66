"""Token ids into text, piece by piece, never half a character."""

from __future__ import annotations

from typing import Any

#: What a decoder shows for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"


class Detokeniser:
    """Incremental decoding of one answer.

    Each piece is decoded together with the one before it, because decoders treat the first token of
    a text differently; tokens that end inside a character wait for the rest of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        #: A `tokenizers.Tokenizer`.
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        #: Shown text ends at `_read`; decoding starts at `_from`.
        self._from = self._read = 0

    @property
    def count(self) -> int:
        """Tokens taken so far."""
        return len(self._tokens)

    def push(self, tokens: list[int]) -> str:
        """The text these tokens add."""
        self._tokens += tokens
        shown = self._decode(self._tokens[self._from : self._read])
        text = self._decode(self._tokens[self._from :])
        if len(text) <= len(shown) or text.endswith(_REPLACEMENT):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return text[len(shown) :]

    def finish(self) -> str:
        """What is left once no more tokens come, incomplete characters as U+FFFD."""
        shown = self._decode(self._tokens[self._from : self._read])
        text = self._decode(self._tokens[self._from :])
        self._from = self._read = len(self._tokens)
        return text[len(shown) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
