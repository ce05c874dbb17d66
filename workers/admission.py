"""Decides before a request reaches the engine whether it can run at all.

One request that can never be scheduled ends the engine's loop for everybody, so nothing gets past
this module that does not fit. Free of torch: the simulated engine admits by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config.catalogue import ModelSpec
from workers.engine import EngineError

#: OpenAI's bound; more would make the scan of every step longer for no use.
MAX_STOP_STRINGS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a model can take."""

    #: Prompt and answer together.
    context_tokens: int
    #: Largest `max_tokens`.
    output_tokens: int
    #: Tokens the KV cache holds for all requests together; 0 when there is no such bound.
    cache_tokens: int = 0
    #: Token ids are below this; 0 when unknown.
    vocabulary: int = 0
    #: Sampling of a request that doesn't say how.
    temperature: float = 1.0
    top_p: float = 1.0

    @classmethod
    def of(cls, spec: ModelSpec, *, vocabulary: int = 0) -> Limits:
        """Those of a catalogue entry."""
        return cls(
            context_tokens=spec.context_tokens,
            output_tokens=spec.output_limit,
            cache_tokens=spec.cache_tokens,
            vocabulary=vocabulary,
            temperature=spec.temperature,
            top_p=spec.top_p,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    #: 0 keeps all tokens.
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """An admitted generation."""

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def admit_prompt(tokens: Sequence[int], limits: Limits, *, param: str) -> None:
    """Check ids against the vocabulary and refuse an empty prompt; raises `EngineError`."""
    if not tokens:
        raise EngineError("invalid_request", "the prompt is empty", param)
    if limits.vocabulary and not (min(tokens) >= 0 and max(tokens) < limits.vocabulary):
        raise EngineError(
            "invalid_request",
            f"token ids must lie between 0 and {limits.vocabulary - 1}",
            param,
        )


def admit_generation(
    body: dict[str, Any], prompt_tokens: int, limits: Limits, *, param: str
) -> Generation:
    """Check that prompt and answer fit; raises `EngineError`.

    Without `max_tokens` the answer may take what the prompt leaves of the context.
    """
    room = limits.context_tokens
    if limits.cache_tokens:
        room = min(room, limits.cache_tokens)
    if prompt_tokens >= room:
        raise EngineError(
            "context_length_exceeded",
            f"the prompt has {prompt_tokens} tokens and leaves no room for an answer"
            f" within {room} tokens",
            param,
        )
    max_tokens = body.get("max_tokens")
    if max_tokens is None:
        max_tokens = min(limits.output_tokens, room - prompt_tokens)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise EngineError("invalid_request", "max_tokens must be a positive integer", "max_tokens")
    if max_tokens > limits.output_tokens:
        raise EngineError(
            "invalid_request",
            f"max_tokens may be at most {limits.output_tokens} for this model",
            "max_tokens",
        )
    if prompt_tokens + max_tokens > room:
        raise EngineError(
            "context_length_exceeded",
            f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed {room} tokens",
            param,
        )
    return Generation(max_tokens=max_tokens, sampling=_sampling(body, limits), stop=_stop(body))


def _sampling(body: dict[str, Any], limits: Limits) -> Sampling:
    temperature = _number(body, "temperature", limits.temperature, low=0.0, high=2.0)
    top_p = _number(body, "top_p", limits.top_p, low=0.0, high=1.0)
    top_k = body.get("top_k") or 0
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise EngineError("invalid_request", "top_k must be an integer of at least 0", "top_k")
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k)


def _number(body: dict[str, Any], name: str, default: float, *, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise EngineError("invalid_request", f"{name} must lie between {low:g} and {high:g}", name)
    return float(value)


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]
    if len(stop) > MAX_STOP_STRINGS:
        raise EngineError(
            "invalid_request", f"stop takes at most {MAX_STOP_STRINGS} strings", "stop"
        )
    if not all(isinstance(text, str) and text for text in stop):
        raise EngineError("invalid_request", "stop strings must not be empty", "stop")
    return tuple(stop)
