"""Whether an input can be run at all, before a token is spent.

As OpenAI has it: a line that can't be told apart or belongs elsewhere (no JSON, no `custom_id`, one
that was there before, another `url`) fails the batch. What is wrong with a request itself is an
answer to that line, and told in the error file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from api.batches.claimed import ClaimedBatch
from api.batches.lines import BadLineError, LineChecker, RawLine
from api.files.store import ObjectMissingError

#: Problems told of one input; nobody reads more.
MAX_PROBLEMS: Final = 100


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found out about a whole input."""

    total: int = 0
    #: The one model that all lines name, if there is one.
    model: str | None = None
    #: Why it can't be run: `code`, `line`, `message`, `param` each.
    problems: list[dict[str, Any]] = field(default_factory=list)


class Validation:
    """Takes the lines of an input one by one."""

    def __init__(self, checker: LineChecker, models: Collection[str], *, max_lines: int) -> None:
        self._checker = checker
        self._known = models
        self._max_lines = max_lines
        self._seen: set[bytes] = set()
        self._models: set[str] = set()
        self._problems: list[dict[str, Any]] = []
        self._total = 0

    @property
    def over(self) -> bool:
        """There is no use in looking further."""
        return len(self._problems) >= MAX_PROBLEMS or self._total > self._max_lines

    def take(self, line: RawLine) -> None:
        self._total += 1
        if self._total > self._max_lines:
            message = f"A batch has at most {self._max_lines} lines."
            self._note("too_many_lines", message, line.number)
            return
        try:
            envelope = self._checker.open(line)
        except BadLineError as error:
            self._note(error.code, error.message, line.number, error.param)
            return
        # Digests: 50,000 long names would be worth as much memory as a file.
        digest = blake2b(envelope.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            message = "Another line before it has the same custom_id."
            self._note("duplicate_custom_id", message, line.number, "custom_id")
        self._seen.add(digest)
        model = envelope.body.get("model")
        if isinstance(model, str) and model in self._known:
            self._models.add(model)

    def end(self) -> Findings:
        """All lines were taken."""
        if not self._total:
            self._note("empty_file", "The file has no lines.", None)
        model = next(iter(self._models)) if len(self._models) == 1 else None
        return Findings(self._total, model, self._problems)

    def _note(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        self._problems.append({"code": code, "line": line, "message": message, "param": param})


async def validate(claimed: ClaimedBatch) -> Findings | None:
    """Look through the whole input; None when the batch was stopped meanwhile."""
    tools = claimed.tools
    max_lines = tools.settings.batches.max_lines
    validation = Validation(claimed.checker, tools.catalogue, max_lines=max_lines)
    try:
        async for line in claimed.lines():
            validation.take(line)
            if validation.over or claimed.stopping.is_set():
                break
    except ObjectMissingError:
        return Findings(
            problems=[
                {"code": "file_not_found", "line": None, "message": "The input file is gone.",
                 "param": "input_file_id"}
            ]
        )  # fmt: skip
    return None if claimed.stopping.is_set() else validation.end()
