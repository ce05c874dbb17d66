"""Decides before a request reaches the engine whether it can run at all.

One request that can never be scheduled ends the engine's loop for everybody, so nothing gets past
this module that does not fit. Free of torch: the simulated engine admits by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from broker.grammars import Constraint, GrammarError, constraint_of
from config.catalogue import ModelSpec
from workers.engine import EngineError

#: OpenAI's bound; more would make the scan of every step longer for no use.
MAX_STOP_STRINGS = 4
#: As in OpenAI's API.
MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20
#: Answers to one request; each takes a place in the batch.
MAX_CHOICES = 16
#: Below this only the likeliest token is left, and scores divided by it are no numbers.
_COLDEST = 1e-5


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
    #: Seeds, penalties, biases and min_p can be honoured.
    shaping: bool = True
    #: Answers can be held to a grammar, and be had with their logprobs.
    steering: bool = True
    #: Most answers to one request.
    choices: int = MAX_CHOICES

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
    #: Least probability as a part of the likeliest token's; 0 keeps all tokens.
    min_p: float = 0.0
    #: Makes draws repeatable; None leaves them to chance.
    seed: int | None = None
    #: 1 changes nothing.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: Added to the scores of tokens, by id.
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST or self.top_k == 1 or self.top_p == 0

    @property
    def cuts(self) -> bool:
        """Unlikely tokens are cut off by `top_p` or `min_p`."""
        return self.top_p < 1 or self.min_p > 0

    @property
    def shapes(self) -> bool:
        """Scores are changed before a token is taken."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """An admitted generation."""

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    #: Answers wanted.
    choices: int = 1
    #: How many of the likeliest tokens are told of at each place; None when no logprobs are wanted.
    top_logprobs: int | None = None
    #: What each answer has to match.
    constraint: Constraint | None = None


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
    return Generation(
        max_tokens=max_tokens,
        sampling=_sampling(body, limits),
        stop=_stop(body),
        choices=_choices(body, limits),
        top_logprobs=_top_logprobs(body, limits),
        constraint=_constraint(body, limits),
    )


def _choices(body: dict[str, Any], limits: Limits) -> int:
    choices = body.get("n")
    if choices is None or choices == 1:
        return 1
    if not isinstance(choices, int) or not 1 <= choices <= MAX_CHOICES:
        raise EngineError("invalid_request", f"n must lie between 1 and {MAX_CHOICES}", "n")
    if choices > limits.choices:
        raise _unsupported("n")
    return choices


def _top_logprobs(body: dict[str, Any], limits: Limits) -> int | None:
    """Chat says `logprobs: true, top_logprobs: 3`, completions say `logprobs: 3`."""
    wanted = body.get("logprobs")
    if wanted is None or wanted is False:
        return None
    if not limits.steering:
        raise _unsupported("logprobs")
    top = (body.get("top_logprobs") or 0) if wanted is True else wanted
    if not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise EngineError(
            "invalid_request", f"at most {MAX_TOP_LOGPROBS} logprobs a token", "top_logprobs"
        )
    return top


def _constraint(body: dict[str, Any], limits: Limits) -> Constraint | None:
    try:
        constraint = constraint_of(body)
    except GrammarError as error:
        raise EngineError("invalid_request", str(error), error.param) from None
    if constraint is not None and not limits.steering:
        raise _unsupported(constraint.param.partition(".")[0])
    return constraint


def _unsupported(name: str) -> EngineError:
    return EngineError("unsupported_parameter", f"{name} is not supported by this worker", name)


def _sampling(body: dict[str, Any], limits: Limits) -> Sampling:
    temperature = _number(body, "temperature", limits.temperature, low=0.0, high=2.0)
    top_p = _number(body, "top_p", limits.top_p, low=0.0, high=1.0)
    top_k = body.get("top_k") or 0
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise EngineError("invalid_request", "top_k must be an integer of at least 0", "top_k")
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=_number(body, "min_p", 0.0, low=0.0, high=1.0),
        seed=_seed(body),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, low=0.01, high=100.0),
        presence_penalty=_number(body, "presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, low=-2.0, high=2.0),
        logit_bias=_logit_bias(body, limits),
    )
    if not limits.shaping:
        for name in ("min_p", "seed", *_SHAPING):
            if getattr(sampling, name) != getattr(_PLAIN, name):
                raise _unsupported(name)
    return sampling


_SHAPING = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
_PLAIN = Sampling()


def _seed(body: dict[str, Any]) -> int | None:
    seed = body.get("seed")
    if seed is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise EngineError("invalid_request", "seed must be an integer of 64 bits", "seed")
    return seed


def _logit_bias(body: dict[str, Any], limits: Limits) -> tuple[tuple[int, float], ...]:
    biases = body.get("logit_bias") or {}
    if not isinstance(biases, dict) or len(biases) > MAX_BIASES:
        raise EngineError(
            "invalid_request", f"logit_bias takes at most {MAX_BIASES} tokens", "logit_bias"
        )
    pairs = []
    for token, bias in biases.items():
        number = int(token) if str(token).isascii() and str(token).isdigit() else -1
        if number < 0 or (limits.vocabulary and number >= limits.vocabulary):
            raise EngineError(
                "invalid_request", "logit_bias must name token ids of the model", "logit_bias"
            )
        pairs.append((number, _number({"logit_bias": bias}, "logit_bias", 0.0, low=-100, high=100)))
    return tuple(pairs)


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
