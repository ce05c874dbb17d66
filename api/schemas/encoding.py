"""The request bodies of what encoders do: embeddings, moderation and reranking."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.schemas.fields import ModelName, TextPart, TokenId, joined_parts, listed
from api.schemas.inference import (
    BYTES_PER_TOKEN,
    TEXTS,
    TOKENS,
    InferenceRequest,
    Neutral,
    Objection,
)
from config.catalogue import ModelSpec

#: Inputs of one request, as in OpenAI's API.
MAX_INPUTS = 2048
#: Documents of one request, as in Cohere's API.
MAX_DOCUMENTS = 1000

_Text = Annotated[str, Field(min_length=1)]


class _EncoderRequest(InferenceRequest):
    #: An extension: the end of an input that is too long is cut instead of refused.
    truncate: bool | None = None


def _many_inputs(value: Any) -> Any:
    """One string or one list of token ids as a list with it."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [value]
    return listed(value)


def _input_form(value: Any) -> str:
    return TOKENS if isinstance(value, list) and value and isinstance(value[0], list) else TEXTS


_Texts = Annotated[
    list[_Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag(TEXTS)
]
_TokenLists = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1, max_length=100_000, fail_fast=True)]],
    Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
    Tag(TOKENS),
]


class EmbeddingRequest(_EncoderRequest):
    endpoint = "/v1/embeddings"
    kind = "embedding"
    neutral: ClassVar[Neutral] = {}

    input: Annotated[
        _Texts | _TokenLists,
        Discriminator(_input_form),
        BeforeValidator(
            _many_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    #: Numbers of a vector; only of models that were trained for it.
    dimensions: Annotated[int, Field(ge=1, le=100_000)] | None = None

    def misfit(self, spec: ModelSpec) -> Objection | None:
        if self.dimensions is None or self.dimensions in spec.dimensions:
            return None
        if not spec.dimensions:
            return Objection(
                "dimensions", "This model has vectors of one size only.", "unsupported_parameter"
            )
        sizes = ", ".join(map(str, sorted(spec.dimensions)))
        return Objection("dimensions", f"This model's vectors may have {sizes} dimensions.")


def _many_texts(value: Any) -> Any:
    """One string, or OpenAI's list of content parts, as a list with one text."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [joined_parts(value)]
    return listed(value)


class ModerationRequest(_EncoderRequest):
    endpoint = "/v1/moderations"
    kind = "classifier"
    neutral: ClassVar[Neutral] = {}

    #: Left out, the only classifier of the catalogue is meant.
    model: ModelName = ""
    input: Annotated[
        list[_Text],
        Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
        BeforeValidator(_many_texts, json_schema_input_type=str | list[str] | list[TextPart]),
    ]


def _document_texts(value: Any) -> Any:
    """Documents may be objects with a text."""
    if not isinstance(value, list):
        return value
    return [
        each["text"] if isinstance(each, dict) and set(each) == {"text"} else each for each in value
    ]


class RerankRequest(_EncoderRequest):
    """As Cohere's and Jina's; `truncate` is Jina's `truncation`."""

    endpoint = "/v1/rerank"
    kind = "reranker"
    neutral: ClassVar[Neutral] = {"max_tokens_per_doc": (), "rank_fields": (["text"],)}

    query: _Text
    documents: Annotated[
        list[_Text],
        Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True),
        BeforeValidator(_document_texts, json_schema_input_type=list[str | dict[str, str]]),
    ]
    #: The best so many; all when left out.
    top_n: Annotated[int, Field(ge=1, le=MAX_DOCUMENTS)] | None = None
    return_documents: bool | None = None

    def cost(self, body: bytes, spec: ModelSpec) -> int:
        """The query is read once with each document."""
        again = (len(self.documents) - 1) * len(self.query)
        return max(1, (len(body) + again) // BYTES_PER_TOKEN)
