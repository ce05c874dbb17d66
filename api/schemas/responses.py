"""`POST /v1/responses`: its request, and what of it is kept in the job.

A response is a job of its own endpoint. The body holds the whole conversation as chat messages,
which is all that a worker looks at, and under `response` what only the API needs again.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NotRequired

import orjson
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    TypeAdapter,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from api.schemas.fields import MaxTokens, Schema, Temperature, TopK, TopP, only
from api.schemas.formats import ResponseTextFormat
from api.schemas.inference import (
    ASSUMED_OUTPUT_TOKENS,
    InferenceRequest,
    Neutral,
    Objection,
    form_objection,
    known_role,
)
from config.catalogue import ModelSpec

ENDPOINT = "/v1/responses"
#: Items of one request, and of one call that adds some to a conversation.
MAX_ITEMS = 10_000
#: The two forms of `input`; pydantic puts the names into the locations of errors.
TEXT, ITEMS = "<text>", "<items>"
#: The two forms of `conversation`.
ID, REFERENCE = "<id>", "<reference>"

#: An answer's own parts come back with these.
_PART_KEYS = frozenset({"type", "text", "annotations", "logprobs"})
_PART_TYPES = frozenset({"input_text", "output_text", "text"})


def joined_parts(value: Any) -> Any:
    """Content in parts, `[{"type": "input_text", "text": …}]`, as one string."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("content_part", "each content part needs a type")
        if part["type"] not in _PART_TYPES:
            raise PydanticCustomError(
                "unsupported_value", "only content parts with text are supported"
            )
        if not part.keys() <= _PART_KEYS:
            raise PydanticCustomError("unsupported_value", "a part of this form is not supported")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "a part of this type needs a text")
        texts.append(part["text"])
    if not texts:
        raise PydanticCustomError("content_part", "at least one content part is needed")
    return "".join(texts)


class Part(TypedDict):
    """For the reference; `joined_parts` checks it."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: NotRequired[Any]
    logprobs: NotRequired[Any]


class InputItem(TypedDict):
    """A message. One that the API gave out may be sent back as it came."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    type: NotRequired[Literal["message"]]
    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(known_role)]
    content: Annotated[str, BeforeValidator(joined_parts, json_schema_input_type=str | list[Part])]
    id: NotRequired[Annotated[str, Field(max_length=64)] | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]
    phase: NotRequired[Annotated[Any, only()]]


def _input_form(value: Any) -> str:
    return ITEMS if isinstance(value, list) else TEXT


def _conversation_form(value: Any) -> str:
    return REFERENCE if isinstance(value, dict) else ID


class ConversationReference(Schema):
    id: Annotated[str, Field(max_length=64)]


class _StreamOptions(Schema):
    include_obfuscation: Annotated[Any, only(False)] = None


Message = dict[str, str]


class TextOptions(Schema):
    format: ResponseTextFormat | None = None
    verbosity: Annotated[Any, only()] = None


class ResponseRequest(InferenceRequest):
    endpoint = ENDPOINT
    kind = "chat"
    neutral: ClassVar[Neutral] = {
        "include": ([],),
        "max_tool_calls": (),
        "parallel_tool_calls": (True, False),
        "prompt": (),
        "reasoning": ({},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag(TEXT)]
        | Annotated[
            list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag(ITEMS)
        ],
        Discriminator(_input_form),
    ]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    conversation: (
        Annotated[
            Annotated[str, Field(max_length=64), Tag(ID)]
            | Annotated[ConversationReference, Tag(REFERENCE)],
            Discriminator(_conversation_form),
        ]
        | None
    ) = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    #: An extension: sample among the k likeliest tokens.
    top_k: TopK | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    background: bool | None = None
    store: bool | None = None

    #: What was said before, from the response or conversation that this one goes on.
    _history: list[Message] = PrivateAttr(default_factory=list)

    def objection(self) -> Objection | None:
        if self.background and self.store is False:
            return Objection("background", "It needs store to be true.")
        if self.conversation is not None and self.previous_response_id is not None:
            return Objection("conversation", "It excludes previous_response_id.")
        if self.conversation is not None and self.store is False:
            return Objection("conversation", "It needs store to be true.")
        if self.stream_options is not None and not self.stream:
            return Objection("stream_options", "It needs stream to be true.")
        return super().objection() or self._form_objection()

    @property
    def _chat_format(self) -> dict[str, Any] | None:
        """The form of the text as a chat writes it."""
        given = self.text.format if self.text is not None else None
        if given is None:
            return None
        if given["type"] == "json_object":
            return {"type": "json_object"}
        named = {name: value for name, value in given.items() if name != "type"}
        return {"type": "json_schema", "json_schema": named}

    def _form_objection(self) -> Objection | None:
        found = form_objection({"response_format": self._chat_format})
        return None if found is None else Objection("text.format.schema", found.message)

    @property
    def conversation_id(self) -> str | None:
        given = self.conversation
        return given.id if isinstance(given, ConversationReference) else given

    @property
    def messages(self) -> list[Message]:
        """The input as chat messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [{"role": item["role"], "content": item["content"]} for item in self.input]

    def go_on_from(self, history: list[Message]) -> None:
        """To be called before `to_body`."""
        self._history.extend(history)

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def limit_name(self) -> str:
        return "max_output_tokens"

    def output_tokens(self, spec: ModelSpec) -> int:
        limit = self.max_output_tokens
        return min(spec.output_limit, ASSUMED_OUTPUT_TOKENS if limit is None else limit)

    def to_body(self) -> bytes:
        said = [{"role": "system", "content": self.instructions}] if self.instructions else []
        mine = self.messages
        own: dict[str, Any] = {
            "inputs": len(mine),
            "instructions": self.instructions,
            "previous_response_id": self.previous_response_id,
            "conversation": self.conversation_id,
            "background": bool(self.background),
            "store": self.store is not False,
        }
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*said, *self._history, *mine],
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "user": self.user,
            "response_format": self._chat_format,
            "stream": True if self.stream else None,
        }
        body = {name: value for name, value in body.items() if value is not None}
        return orjson.dumps({**body, "response": own})


RESPONSE = TypeAdapter(ResponseRequest)


class Retrieval(Schema):
    """Query of `GET /v1/responses/{id}`; strings come in."""

    stream: Annotated[bool, Field(strict=False)] = False
    starting_after: Annotated[int, Field(ge=0, le=10**12, strict=False)] | None = None
    include_obfuscation: Literal["false"] | None = None


class ItemListing(Schema):
    """Query of a list of items."""

    after: Annotated[str, Field(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20
    order: Literal["asc", "desc"] = "desc"


RETRIEVAL = TypeAdapter(Retrieval)
ITEM_LISTING = TypeAdapter(ItemListing)
