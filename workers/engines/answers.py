"""One running answer: tokens in, text out, until a stop string, an end token or the length."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from broker.jobs import Usage
from broker.pieces import TokenLogprob
from workers.admission import Generation
from workers.engine import EngineError, EngineResult
from workers.engines.detokenising import Detokeniser
from workers.engines.progress import Progress, shown
from workers.engines.stopping import StopScanner
from workers.engines.vocabulary import Vocabulary

#: Takes a piece of text, and the logprobs of its tokens where they are wanted.
OnPiece = Callable[[str, list[TokenLogprob]], None]


class Answer:
    """State of a request in the continuous engine; used by one thread at a time."""

    def __init__(
        self,
        *,
        prompt: list[int],
        generation: Generation,
        tokenizer: Any,
        vocabulary: Vocabulary,
        end_tokens: frozenset[int],
        on_piece: OnPiece | None,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        """`on_first` is called once there is a token, and before the answer ends."""
        self.prompt = prompt
        self.generation = generation
        self.future: Future[EngineResult] = Future()
        guide = None
        if generation.constraint is not None:
            guide = vocabulary.guide(generation.constraint)
        self.progress = Progress(guide, generation.top_logprobs)
        self._ends = end_tokens
        self._vocabulary = vocabulary
        self._on_piece = on_piece
        self._on_first = on_first
        self._detokeniser = Detokeniser(tokenizer)
        self._scanner = StopScanner(generation.stop)
        self._text: list[str] = []
        self._shown = _LogprobsShown(self.progress, vocabulary, end_tokens)

    @property
    def every_token(self) -> bool:
        """Tokens are looked at as they come: somebody waits for them, or a stop string may end
        it."""
        return (
            self._on_piece is not None or self._on_first is not None or bool(self.generation.stop)
        )

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._scanner.stopped

    @property
    def refusal(self) -> EngineError | None:
        """Why the answer can't go on, where that lies in the request."""
        guide = self.progress.guide
        return guide.refusal if guide is not None and guide.failed else None

    def take(self, generated: list[int]) -> None:
        """Take all tokens so far; those already known are skipped."""
        fresh = generated[self._detokeniser.count :]
        if fresh and self._on_first is not None:
            begin, self._on_first = self._on_first, None
            begin()
        if not self.generation.stop and self.progress.top is None:
            self._show(self._detokeniser.push(fresh))
            return
        for token in fresh:
            piece = self._detokeniser.push([token])
            self._shown.decoded(len(piece))
            self._show(self._scanner.push(piece))
            if self._scanner.stopped:
                return

    def finish(self, generated: list[int], cached: int) -> EngineResult:
        """The result, once no more tokens come."""
        self.take(generated)
        if not self.stopped:
            self._show(self._scanner.push(self._detokeniser.finish()))
        if not self.stopped:
            self._show(self._scanner.finish(), last=True)
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

    def _show(self, text: str, *, last: bool = False) -> None:
        logprobs = self._shown.up_to(len(text), last=last)
        if text:
            self._text.append(text)
        if (text or logprobs) and self._on_piece is not None:
            self._on_piece(text, logprobs)

    def _result(self, reason: Literal["stop", "length"], cached: int) -> EngineResult:
        return EngineResult(
            text="".join(self._text),
            finish_reason=reason,
            logprobs=None if self.progress.top is None else self._shown.all,
            usage=self._usage(self._detokeniser.count, cached),
        )

    def _usage(self, output: int, cached: int) -> Usage:
        return Usage(input_tokens=len(self.prompt), output_tokens=output, cached_tokens=cached)


class _LogprobsShown:
    """Lets the logprobs of a token through with the first character of it that is shown.

    Of tokens behind a stop string nothing is shown, and end tokens are part of no text.
    """

    def __init__(
        self, progress: Progress, vocabulary: Vocabulary, end_tokens: frozenset[int]
    ) -> None:
        self._progress = progress
        self._vocabulary = vocabulary
        self._ends = end_tokens
        #: Where in the text each token begins.
        self._starts: list[int] = []
        #: Characters decoded, and shown.
        self._decoded = self._shown = 0
        #: All that was let through.
        self.all: list[TokenLogprob] = []
        self._next = 0

    def decoded(self, characters: int) -> None:
        """One more token, which has added so many characters."""
        self._starts.append(self._decoded)
        self._decoded += characters

    def up_to(self, characters: int, *, last: bool) -> list[TokenLogprob]:
        """What goes with so many more characters; with the `last` goes all that is left."""
        if self._progress.top is None:
            return []
        self._shown += characters
        fresh = []
        for start in self._starts[self._next :]:
            if start >= self._shown and not last:
                break
            scored = self._progress.scored[self._next]
            self._next += 1
            if scored.token not in self._ends:
                fresh.append(shown(scored, self._vocabulary))
        self.all += fresh
        return fresh
