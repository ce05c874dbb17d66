"""What a worker asks of an engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from broker.jobs import Usage
from broker.pieces import TokenLogprob


class EngineError(Exception):
    """The engine can't run this request; the code is one of the API's error codes."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class EngineLostError(Exception):
    """The engine died under this request; it is not the request's fault as far as is known."""


class RequestCancelledError(Exception):
    """The request was cancelled; carries what was generated so far."""

    def __init__(self, result: EngineResult) -> None:
        super().__init__("cancelled")
        self.result = result


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """An admitted request."""

    #: `job_…`; unique among the engine's running requests.
    id: str
    #: OpenAI path, e.g. `/v1/embeddings`.
    endpoint: str
    #: The validated request body.
    body: dict[str, Any]
    #: Called in the engine's thread with each piece of text; None when no deltas are wanted.
    on_text: Callable[[str], None] | None = None
    #: Called in its place where there are several answers or logprobs: with the number of the
    #: answer, the piece, and the logprobs of its tokens.
    on_piece: Callable[[int, str, list[TokenLogprob]], None] | None = None


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the answers to a request."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    #: Of its tokens, in order; None when they weren't wanted.
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a classifier says of one input, by the labels of its model."""

    #: Between 0 and 1.
    scores: dict[str, float]
    #: The score reaches the label's threshold.
    flags: dict[str, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult:
    text: str = ""
    finish_reason: FinishReason = "stop"
    #: Of the tokens of `text`; None when they weren't wanted.
    logprobs: list[TokenLogprob] | None = None
    #: Further answers, where more than one was wanted.
    others: tuple[Choice, ...] = ()
    #: One per input, for embeddings.
    vectors: list[list[float]] = field(default_factory=list)
    #: One per input, for classifiers.
    judgements: list[Judgement] = field(default_factory=list)
    #: One per document, for rerankers; between 0 and 1.
    relevance: list[float] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)


class Engine(Protocol):
    """One model on one device. Thread-safe."""

    #: Shown by consoles and metrics, e.g. `transformers` or `simulated`.
    name: str
    #: Requests that fit into one batch; the worker's concurrency.
    capacity: int

    def start(self) -> None:
        """Load the model and warm it up; returns when it is ready."""
        ...

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        """Admit a request and start it.

        Raises `EngineError` when it can't be run. The future ends with a result, `EngineError`,
        `RequestCancelledError` or `EngineLostError`.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step and free its slot; unknown ids are ignored."""
        ...

    @property
    def steps(self) -> int:
        """Steps done since start; stands still when the loop is stuck (or idle)."""
        ...

    @property
    def alive(self) -> bool: ...

    def stop(self) -> None: ...
