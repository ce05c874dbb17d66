"""One running answer: tokens in, text out, until a stop string, an end token or the length."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from broker.jobs import Usage
from workers.admission import Generation
from workers.engine import EngineResult
from workers.engines.detokenising import Detokeniser
from workers.engines.stopping import StopScanner


class Answer:
    """State of a request in the continuous engine; used by one thread at a time."""

    def __init__(
        self,
        *,
        prompt: list[int],
        generation: Generation,
        tokenizer: Any,
        end_tokens: frozenset[int],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.prompt = prompt
        self.generation = generation
        self.future: Future[EngineResult] = Future()
        self._ends = end_tokens
        self._on_text = on_text
        self._detokeniser = Detokeniser(tokenizer)
        self._scanner = StopScanner(generation.stop)
        self._text: list[str] = []

    @property
    def every_token(self) -> bool:
        """Tokens are looked at as they come: somebody reads along, or a stop string may end it."""
        return self._on_text is not None or bool(self.generation.stop)

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._scanner.stopped

    def take(self, generated: list[int]) -> None:
        """Take all tokens so far; those already known are skipped."""
        fresh = generated[self._detokeniser.count :]
        if not self.generation.stop:
            self._show(self._detokeniser.push(fresh))
            return
        for token in fresh:
            self._show(self._scanner.push(self._detokeniser.push([token])))
            if self._scanner.stopped:
                return

    def finish(self, generated: list[int], cached: int) -> EngineResult:
        """The result, once no more tokens come."""
        self.take(generated)
        if not self.stopped:
            self._show(self._scanner.push(self._detokeniser.finish()))
        if not self.stopped:
            self._show(self._scanner.finish())
        ended = bool(generated) and generated[-1] in self._ends
        return self._result("stop" if self.stopped or ended else "length", cached)

    def cut(self, generated: list[int], cached: int) -> EngineResult:
        """What there is of a cancelled answer. Leaves the state alone: another thread may be in
        `take`."""
        text = "".join(self._text)
        if not self.every_token:
            detokeniser = Detokeniser(self._detokeniser.tokenizer)
            text = detokeniser.push(generated) + detokeniser.finish()
        return EngineResult(
            text=text,
            finish_reason="cancelled",
            usage=self._usage(len(generated), cached),
        )

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            if self._on_text is not None:
                self._on_text(text)

    def _result(self, reason: Literal["stop", "length"], cached: int) -> EngineResult:
        return EngineResult(
            text="".join(self._text),
            finish_reason=reason,
            usage=self._usage(self._detokeniser.count, cached),
        )

    def _usage(self, output: int, cached: int) -> Usage:
        return Usage(input_tokens=len(self.prompt), output_tokens=output, cached_tokens=cached)
