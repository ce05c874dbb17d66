"""The request bodies of the OpenAI-compatible endpoints, and what becomes of them.

`to_body()` is the normalised body kept in the job: nulls dropped, aliases folded, one form for each
thing that OpenAI lets callers write in several.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from api.schemas.fields import (
    TIERS,
    Content,
    MaxTokens,
    Metadata,
    ModelName,
    Schema,
    Stop,
    Temperature,
    TokenId,
    TopK,
    TopP,
    User,
    conflict,
    listed,
    only,
    unsupported,
)
from broker.jobs import Band
from config.catalogue import ModelSpec

#: Output tokens a request that names no `max_tokens` is charged for until its real count is known.
ASSUMED_OUTPUT_TOKENS = 256
#: Bytes of JSON that count as one token in the estimate.
BYTES_PER_TOKEN = 4


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class InferenceRequest(Schema):
    """What all endpoints share."""

    #: Path this body belongs to, and the kind of model it needs.
    endpoint: ClassVar[str]
    kind: ClassVar[Literal["chat", "embedding"]]

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

    @model_validator(mode="after")
    def _one_priority(self) -> Self:
        tier = TIERS.get(self.service_tier or "auto")
        if tier is not None and self.priority is not None and tier != self.priority:
            raise conflict("priority", "It contradicts service_tier")
        return self

    @property
    def band(self) -> Band | None:
        """The band asked for; None leaves it to the tenant's policy."""
        if self.priority is not None:
            return Band(self.priority)
        return TIERS.get(self.service_tier or "auto")

    @property
    def streams(self) -> bool:
        return False

    def to_body(self) -> bytes:
        return self.__pydantic_serializer__.to_json(self, exclude_none=True)

    def output_tokens(self, spec: ModelSpec) -> int:
        """Estimate of the tokens that will be generated."""
        return 0

    def cost(self, body: bytes, spec: ModelSpec) -> int:
        """Estimated tokens of the job: bytes / 4, and what may be generated.

        Settled with the real counts at the end, so it only has to be fair, not exact.
        """
        return max(1, len(body) // BYTES_PER_TOKEN) + self.output_tokens(spec)


class GenerationRequest(InferenceRequest):
    """What chat and text completions share."""

    kind = "chat"

    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    #: An extension: sample among the k likeliest tokens.
    top_k: TopK | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[Any, only(1)] = None
    seed: Annotated[Any, only()] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "It needs stream to be true")
        return self

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The parameter that bounds the output, and its value."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    def output_tokens(self, spec: ModelSpec) -> int:
        limit = self.token_limit
        return min(spec.output_limit, ASSUMED_OUTPUT_TOKENS if limit is None else limit[1])


def _known_role(role: str) -> str:
    """`developer` is OpenAI's newer word for `system`."""
    return "system" if role == "developer" else role


class Message(Schema):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"], AfterValidator(_known_role)
    ]
    content: Content
    # An answer of the API may be sent back as it came.
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None


class ChatRequest(GenerationRequest):
    endpoint = "/v1/chat/completions"

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    # Folded into `max_tokens` by `to_body`.
    max_completion_tokens: Annotated[MaxTokens | None, Field(exclude=True)] = None

    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only(0)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    store: Annotated[Any, only(False)] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_completion_tokens is not None and self.max_tokens not in (
            None,
            self.max_completion_tokens,
        ):
            raise conflict("max_completion_tokens", "It contradicts max_tokens")
        return self

    @property
    def token_limit(self) -> tuple[str, int] | None:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit

    def to_body(self) -> bytes:
        body = super().to_body()
        if self.max_completion_tokens is None or self.max_tokens is not None:
            return body
        return b'%b,"max_tokens":%d}' % (body[:-1], self.max_completion_tokens)


def _one_prompt(value: Any) -> Any:
    """A list with a single prompt in it is that prompt; several are not supported."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise unsupported()
        return value[0]
    return value


class CompletionRequest(GenerationRequest):
    endpoint = "/v1/completions"

    prompt: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000, fail_fast=True)],
        BeforeValidator(_one_prompt),
    ]

    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    logprobs: Annotated[Any, only()] = None
    suffix: Annotated[Any, only("")] = None


def _many_inputs(value: Any) -> Any:
    """One string or one list of token ids as a list with it."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [value]
    return listed(value)


_Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=2048, fail_fast=True),
]
_TokenLists = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1, max_length=100_000, fail_fast=True)]],
    Field(min_length=1, max_length=2048, fail_fast=True),
]


class EmbeddingRequest(InferenceRequest):
    endpoint = "/v1/embeddings"
    kind = "embedding"

    input: Annotated[_Texts | _TokenLists, BeforeValidator(_many_inputs)]
    encoding_format: Literal["float", "base64"] | None = None

    dimensions: Annotated[Any, only()] = None
