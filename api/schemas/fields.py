"""Building blocks of the request schemas: strict, bounded, silent about their input."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from broker.jobs import Band

#: OpenAI's `service_tier` as a band; `auto` leaves it to the tenant.
TIERS: Final[Mapping[str | None, Band]] = {
    "priority": Band.INTERACTIVE,
    "default": Band.STANDARD,
    "flex": Band.BATCH,
}
#: The tier echoed for a band.
TIER_OF: Final[Mapping[Band, str]] = {
    Band.INTERACTIVE: "priority",
    Band.STANDARD: "default",
    Band.BATCH: "flex",
}


#: `2026-01-31T12:00:00Z`; ISO 8601 knows shorter forms.
_SHORTEST_TIME: Final = 20


class Schema(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        # A request is parsed once and never changed.
        frozen=True,
    )


def unsupported() -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", "this value is not supported")


def changes_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether the value of a parameter that isn't supported may be ignored."""
    # 0 == False, and `n: true` is not `n: 1`.
    return value is None or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    )


def only(*neutral: Any) -> AfterValidator:
    """For a known parameter that can't be honoured; it becomes null."""

    def check(value: Any) -> None:
        if not changes_nothing(value, neutral):
            raise unsupported()

    return AfterValidator(check)


def nothing_if(neutral: Any) -> AfterValidator:
    """For a parameter that has a value which asks for nothing; it becomes null."""
    return AfterValidator(lambda value: None if value == neutral else value)


def listed(value: Any) -> Any:
    """One string where a list of them is meant."""
    return [value] if isinstance(value, str) else value


def unix_time(value: Any) -> Any:
    """A date and time as RFC 3339 writes it, as Unix seconds."""
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None or len(value) < _SHORTEST_TIME:
            raise ValueError
        return moment.timestamp()
    except (ValueError, OverflowError):
        raise PydanticCustomError(
            "date_time", "it must be Unix seconds, or date and time with an offset (RFC 3339)"
        ) from None


def joined_parts(value: Any) -> Any:
    """Message content in parts, `[{"type": "text", "text": …}]`, as one string."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("content_part", "each content part needs a type")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "a text part needs a text")
        if part["type"] != "text" or len(part) != 2:
            raise PydanticCustomError(
                "unsupported_value", "only content parts of type text are supported"
            )
        texts.append(part["text"])
    if not texts:
        raise PydanticCustomError("content_part", "at least one content part is needed")
    return "".join(texts)


class TextPart(TypedDict):
    """For the reference; `joined_parts` checks it."""

    type: Literal["text"]
    text: str


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Content = Annotated[str, BeforeValidator(joined_parts, json_schema_input_type=str | list[TextPart])]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=1, le=1_000_000)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=300),
]
MaxTokens = Annotated[int, Field(ge=1)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=4),
    BeforeValidator(listed, json_schema_input_type=str | list[str]),
]
User = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
