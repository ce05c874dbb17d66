"""Texts and pairs of texts as an encoder wants them: token ids within its marks.

Nothing is cut short unless the request asks for it; then its end goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.admission import Limits, admit_prompt
from workers.engine import EngineError
from workers.prompts import PromptBuilder


@dataclass(frozen=True, slots=True)
class _Marks:
    """What stands before, between and after texts, e.g. `[CLS]` and `[SEP]`."""

    before: list[int]
    after: list[int]
    between: list[int]
    #: Where, within `between`, the second text's type of token begins.
    turn: int

    @property
    def one(self) -> int:
        """Tokens around a single text."""
        return len(self.before) + len(self.after)

    @property
    def pair(self) -> int:
        return self.one + len(self.between)


class TextEncoder:
    """Thread-safe. Raises `EngineError` for what the model can't take."""

    def __init__(self, prompts: PromptBuilder, limits: Limits) -> None:
        self._prompts = prompts
        self._limits = limits
        self._marks = _marks(prompts)

    def plain(self, item: str | list[int]) -> list[int]:
        """Without marks; control tokens typed by users are text."""
        return self._prompts.text(item) if isinstance(item, str) else item

    def one(self, item: str | list[int], *, param: str, place: str, cut: bool) -> list[int]:
        """A text, or token ids, with its marks. `place` is what an error calls it."""
        inner = self.plain(item)
        admit_prompt(inner, self._limits, param=param)
        room = self._limits.context_tokens - self._marks.one
        if len(inner) > room:
            if not cut:
                raise _too_long(place, len(inner) + self._marks.one, self._limits, param)
            inner = inner[:room]
        return [*self._marks.before, *inner, *self._marks.after]

    def pair(
        self, first: list[int], second: Sequence[int], *, param: str, place: str, cut: bool
    ) -> tuple[list[int], int]:
        """Two texts without marks as one input, and where the second one begins in it.

        Only the second one is ever cut.
        """
        admit_prompt(second, self._limits, param=param)
        marks = self._marks
        room = self._limits.context_tokens - marks.pair - len(first)
        if len(second) > room:
            if not cut:
                raise _too_long(
                    f"{place} with its query",
                    len(first) + len(second) + marks.pair,
                    self._limits,
                    param,
                )
            second = second[:room]
        tokens = [*marks.before, *first, *marks.between, *second, *marks.after]
        return tokens, len(marks.before) + len(first) + marks.turn

    def query(self, text: str, *, param: str) -> list[int]:
        """The first text of pairs; must leave room for a token of the second one."""
        tokens = self.plain(text)
        admit_prompt(tokens, self._limits, param=param)
        if len(tokens) + self._marks.pair >= self._limits.context_tokens:
            raise EngineError(
                "context_length_exceeded",
                f"the query has {len(tokens)} tokens and leaves no room for a document within"
                f" {self._limits.context_tokens} tokens",
                param,
            )
        return tokens


def _too_long(place: str, tokens: int, limits: Limits, param: str) -> EngineError:
    return EngineError(
        "context_length_exceeded",
        f"{place} has {tokens} tokens; the model takes {limits.context_tokens}"
        " (with `truncate` its end is cut)",
        param,
    )


def _marks(prompts: PromptBuilder) -> _Marks:
    bare = prompts.template.encode("a", add_special_tokens=False).ids
    one = prompts.template.encode("a", add_special_tokens=True).ids
    pair = prompts.template.encode("a", "a", add_special_tokens=True)
    start = _find(bare, one, 0)
    if start < 0:
        return _Marks([], [], [], 0)
    first = _find(bare, pair.ids, 0)
    second = _find(bare, pair.ids, first + len(bare))
    between = pair.ids[first + len(bare) : second]
    types = pair.type_ids[first + len(bare) : second]
    # A mark that closes the first text is of its type.
    turn = types.index(1) if 1 in types else len(between)
    return _Marks(one[:start], one[start + len(bare) :], between, turn)


def _find(part: list[int], whole: list[int], start: int) -> int:
    for place in range(start, len(whole) - len(part) + 1):
        if whole[place : place + len(part)] == part:
            return place
    return -1
