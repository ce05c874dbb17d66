"""The request bodies of the OpenAI-compatible endpoints, and what becomes of them.

`to_body()` is the normalised body kept in the job: nulls dropped, aliases folded, one form for each
thing that OpenAI lets callers write in several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from typing_extensions import TypedDict

from api.schemas.fields import (
    TIERS,
    Content,
    LogitBias,
    MaxTokens,
    Metadata,
    MinP,
    ModelName,
    Penalty,
    RepetitionPenalty,
    Schema,
    Seed,
    Stop,
    Temperature,
    TokenId,
    TopK,
    TopP,
    User,
    changes_nothing,
    nothing_if,
    only,
    unsupported,
)
from api.schemas.formats import ResponseFormat, Structured
from broker.grammars import GrammarError, constraint_of
from broker.jobs import Band
from broker.pieces import wants_logprobs
from config.catalogue import Kind, ModelSpec

#: The two forms of an input; pydantic puts the names into the locations of errors.
TEXTS = "<texts>"
TOKENS = "<tokens>"

Neutral = Mapping[str, tuple[Any, ...]]

#: Output tokens a request that names no `max_tokens` is charged for until its real count is known.
ASSUMED_OUTPUT_TOKENS = 256
#: Answers to one request; each takes a place in a worker's batch.
MAX_CHOICES = 16
#: Bytes of JSON that count as one token in the estimate.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Objection:
    """A parameter that can't be honoured or contradicts another one; `code` is of the API."""

    param: str
    message: str
    code: str = "invalid_request"


class InferenceRequest(Schema):
    """What all endpoints share."""

    # Parameters without a field are collected, and judged by `objection`.
    model_config = ConfigDict(extra="allow")

    #: Path this body belongs to, and the kind of model it needs.
    endpoint: ClassVar[str]
    kind: ClassVar[Kind]
    #: Known parameters that can't be honoured, and values of them that change nothing; null
    #: never does.
    neutral: ClassVar[Neutral]

    model: ModelName
    user: User | None = None
    # Kept in the job itself, not in its body.
    metadata: Annotated[Metadata | None, Field(exclude=True)] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "priority"] | None, Field(exclude=True)
    ] = None
    priority: Annotated[Literal["interactive", "standard", "batch"] | None, Field(exclude=True)] = (
        None
    )

    def objection(self) -> Objection | None:
        """What is wrong with the request as a whole, if anything."""
        for name, value in (self.model_extra or {}).items():
            if name not in self.neutral:
                return Objection(name, "This parameter is not supported.", "unsupported_parameter")
            if not changes_nothing(value, self.neutral[name]):
                return Objection(name, "This value is not supported.", "unsupported_parameter")
        if (
            self.priority is not None
            and TIERS.get(self.service_tier, self.priority) != self.priority
        ):
            return Objection("priority", "It contradicts service_tier.")
        return None

    def misfit(self, spec: ModelSpec) -> Objection | None:
        """What this model can't do of it, if anything."""
        limit = self.token_limit
        if limit is not None and limit > spec.output_limit:
            return Objection(
                self.limit_name, f"This model generates at most {spec.output_limit} tokens."
            )
        return None

    @property
    def band(self) -> Band | None:
        """The band asked for; None leaves it to the tenant's policy."""
        if self.priority is not None:
            return Band(self.priority)
        return TIERS.get(self.service_tier)

    @property
    def streams(self) -> bool:
        return False

    @property
    def logprobs_wanted(self) -> bool:
        """What a tenant has to be allowed."""
        return False

    @property
    def token_limit(self) -> int | None:
        """Most tokens that may be generated for an answer, where the caller says so."""
        return None

    @property
    def limit_name(self) -> str:
        """The parameter that says it."""
        return "max_tokens"

    def to_body(self) -> bytes:
        # Nothing among the extras has an effect once `objection` has found none.
        neutral = set(self.model_extra) if self.model_extra else None
        return self.__pydantic_serializer__.to_json(self, exclude_none=True, exclude=neutral)

    def output_tokens(self, spec: ModelSpec) -> int:
        """Estimate of the tokens that will be generated."""
        return 0

    def cost(self, body: bytes, spec: ModelSpec) -> int:
        """Estimated tokens of the job: bytes / 4, and what may be generated.

        Settled with the real counts at the end, so it only has to be fair, not exact.
        """
        return max(1, len(body) // BYTES_PER_TOKEN) + self.output_tokens(spec)


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class GenerationRequest(InferenceRequest):
    """What chat and text completions share."""

    kind = "chat"
    neutral: ClassVar[Neutral] = {}

    #: Answers wanted.
    n: Annotated[Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None, nothing_if(1)] = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    #: An extension: sample among the k likeliest tokens.
    top_k: TopK | None = None
    #: Extensions, as vLLM has them.
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def objection(self) -> Objection | None:
        if self.stream_options is not None and not self.stream:
            return Objection("stream_options", "It needs stream to be true.")
        if self.response_format is not None and self.structured_outputs is not None:
            return Objection("structured_outputs", "It excludes response_format.")
        return super().objection() or self._form_objection()

    def _form_objection(self) -> Objection | None:
        form = {
            "response_format": self.response_format,
            "structured_outputs": self.structured_outputs,
        }
        return form_objection(form)

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    def output_tokens(self, spec: ModelSpec) -> int:
        limit = self.token_limit
        tokens = min(spec.output_limit, ASSUMED_OUTPUT_TOKENS if limit is None else limit)
        return tokens * (self.n or 1)


def form_objection(form: Mapping[str, Any]) -> Objection | None:
    """What is wrong with the form asked for, given as in a job's body."""
    try:
        constraint_of(form)
    except GrammarError as error:
        return Objection(error.param, str(error))
    return None


def known_role(role: str) -> str:
    """`developer` is OpenAI's newer word for `system`."""
    return "system" if role == "developer" else role


class Message(TypedDict):
    """A dictionary, because long conversations have many: no object is made for each."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(known_role)]
    content: Content
    # An answer of the API may be sent back as it came.
    refusal: NotRequired[Annotated[Any, only()]]
    annotations: NotRequired[Annotated[Any, only([])]]
    audio: NotRequired[Annotated[Any, only()]]
    function_call: NotRequired[Annotated[Any, only()]]
    tool_calls: NotRequired[Annotated[Any, only([])]]


class ChatRequest(GenerationRequest):
    endpoint = "/v1/chat/completions"
    neutral: ClassVar[Neutral] = {
        **GenerationRequest.neutral,
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "store": (False,),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "audio": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    logprobs: Annotated[bool | None, nothing_if(False)] = None
    top_logprobs: Annotated[Annotated[int, Field(ge=0, le=20)] | None, nothing_if(0)] = None
    # Folded into `max_tokens` by `to_body`.
    max_completion_tokens: Annotated[MaxTokens | None, Field(exclude=True)] = None

    def objection(self) -> Objection | None:
        limit = self.max_completion_tokens
        if limit is not None and self.max_tokens not in (None, limit):
            return Objection("max_completion_tokens", "It contradicts max_tokens.")
        if self.top_logprobs and not self.logprobs:
            return Objection("top_logprobs", "It needs logprobs to be true.")
        return super().objection()

    @property
    def logprobs_wanted(self) -> bool:
        return wants_logprobs({"logprobs": self.logprobs})

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"

    def to_body(self) -> bytes:
        body = super().to_body()
        if self.max_completion_tokens is None or self.max_tokens is not None:
            return body
        return b'%b,"max_tokens":%d}' % (body[:-1], self.max_completion_tokens)


def _prompt_form(value: Any) -> str:
    return TOKENS if isinstance(value, list) else TEXTS


def _one_prompt(value: Any) -> Any:
    """A list with a single prompt in it is that prompt; several are not supported."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise unsupported()
        return value[0]
    return value


class CompletionRequest(GenerationRequest):
    endpoint = "/v1/completions"
    neutral: ClassVar[Neutral] = {
        **GenerationRequest.neutral,
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    #: How many of the likeliest tokens are told of at each place.
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    prompt: Annotated[
        Annotated[str, Field(min_length=1), Tag(TEXTS)]
        | Annotated[
            list[TokenId], Field(min_length=1, max_length=1_000_000, fail_fast=True), Tag(TOKENS)
        ],
        Discriminator(_prompt_form),
        BeforeValidator(_one_prompt, json_schema_input_type=str | list[str] | list[int]),
    ]

    @property
    def logprobs_wanted(self) -> bool:
        return wants_logprobs({"logprobs": self.logprobs})
