"""What form an answer is asked to have, as each endpoint writes it."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from broker.grammars import MAX_CHOICES, MAX_REGEX

_CONFIG = ConfigDict(strict=True, extra="forbid")

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Description = Annotated[str, Field(max_length=4096)]


class TextFormat(TypedDict):
    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    type: Literal["json_object"]


class JsonSchema(TypedDict):
    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    name: Name
    description: NotRequired[Description | None]
    schema: dict[str, Any]
    # Answers always keep to the schema.
    strict: NotRequired[bool | None]


class JsonSchemaFormat(TypedDict):
    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    type: Literal["json_schema"]
    json_schema: JsonSchema


class NamedSchemaFormat(TypedDict):
    """The same as responses write it."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    type: Literal["json_schema"]
    name: Name
    description: NotRequired[Description | None]
    schema: dict[str, Any]
    strict: NotRequired[bool | None]


class StructuredOutputs(TypedDict):
    """An extension, as vLLM has it: what the whole answer matches, or is one of."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]

    regex: NotRequired[Annotated[str, Field(min_length=1, max_length=MAX_REGEX)]]
    choice: NotRequired[
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    ]


def _no_text(value: Any) -> Any:
    """Any text is what an answer is anyhow."""
    return None if value["type"] == "text" else value


def _one_of(value: StructuredOutputs) -> StructuredOutputs:
    if len(value) != 1:
        raise PydanticCustomError("one_of", "it needs either regex or choice")
    return value


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return _TAGS.get(kind) if isinstance(kind, str) else None


_TAGS: Final = {name: f"<{name}>" for name in ("text", "json_object", "json_schema")}
#: The names that pydantic puts into the locations of errors.
TAGS: Final = frozenset(_TAGS.values())
_DISCRIMINATOR: Final = Discriminator(
    _kind,
    custom_error_type="format_type",
    custom_error_message="its type must be text, json_object or json_schema",
)

ResponseFormat = Annotated[
    Annotated[
        Annotated[TextFormat, Tag("<text>")]
        | Annotated[JsonObjectFormat, Tag("<json_object>")]
        | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
        _DISCRIMINATOR,
    ],
    AfterValidator(_no_text),
]
Structured = Annotated[StructuredOutputs, AfterValidator(_one_of)]
ResponseTextFormat = Annotated[
    Annotated[
        Annotated[TextFormat, Tag("<text>")]
        | Annotated[JsonObjectFormat, Tag("<json_object>")]
        | Annotated[NamedSchemaFormat, Tag("<json_schema>")],
        _DISCRIMINATOR,
    ],
    AfterValidator(_no_text),
]
