"""Which schemas and expressions are followed, and that hostile ones are refused."""

from __future__ import annotations

from typing import Any

import pytest

from broker.grammars import MAX_SCHEMA_BYTES, GrammarError, constraint_of

PARAM = "response_format.json_schema.schema"


def _of(schema: Any) -> Any:
    named = {"name": "answer", "schema": schema}
    return constraint_of({"response_format": {"type": "json_schema", "json_schema": named}})


def _refusal(schema: Any) -> str:
    with pytest.raises(GrammarError) as refused:
        _of(schema)
    assert refused.value.param == PARAM
    return str(refused.value)


def _nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_body_without_a_form_has_no_constraint() -> None:
    assert constraint_of({"response_format": None, "structured_outputs": None}) is None


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": ["string", "null"], "maxLength": 5, "pattern": "^[a-z]+$"},
        {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#"}}}}},
        {"anyOf": [{"type": "integer", "minimum": 3}, {"const": None}], "title": "either"},
        {"type": "string", "format": "date-time", "default": "x-guidance"},
        {"properties": {"allOf": {"enum": [{"allOf": 1}]}}, "required": ["allOf"]},
        {"properties": {"default": {"type": "null"}, "a": {"$ref": "#/properties/default"}}},
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a%20b"}], "$defs": {"a b": {}}},
        _nested(20),
    ],
)
def test_schemas_that_are_followed(schema: Any) -> None:
    assert _of(schema).param == PARAM


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"not": {}}, "not supported: not"),
        ({"if": {}, "then": {}}, "not supported"),
        ({"type": "array", "uniqueItems": True}, "not supported: uniqueItems"),
        ({"allOf": [{}]}, "not supported: allOf"),
        ({"items": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"$ref": "#/$defs/a", "pattern": "a", "$defs": {"a": {}}}, "$ref can't be combined"),
        ({"anyOf": [{}], "properties": {}}, "anyOf can't be combined"),
        ({"oneOf": [{}], "minLength": 1}, "oneOf can't be combined"),
        ({"enum": []}, "Nothing satisfies it"),
        ({"format": "of-my-own", "type": "string"}, "format that is not known"),
        ({"$ref": "http://localhost/schema"}, "$ref may only lead"),
        ({"$ref": 1}, "$ref may only lead"),
        ({"items": {"$ref": "#there"}, "$defs": {"a": {"$anchor": "there"}}}, "$ref may only lead"),
        ({"type": "text"}, "can't be read"),
        (_nested(40), "nested"),
        (_nested(400), "nested"),
        ({"const": 10**400}, "too long"),
        ({"description": "x" * MAX_SCHEMA_BYTES}, "bytes"),
        ({"pattern": "a" * 3000}, "characters"),
        ({"patternProperties": {f"^{x}": {} for x in "abcdefghi"}}, "patternProperties"),
    ],
)
def test_schemas_that_are_refused(schema: Any, told: str) -> None:
    assert told in _refusal(schema)


def test_intersections_that_take_for_ever_are_never_made() -> None:
    """Thirty of them keep the library busy for more than minutes."""
    patterns = [{"type": "string", "pattern": f"^(.*a.{{{size}}})$"} for size in range(30)]
    assert "allOf" in _refusal({"allOf": patterns})
    chain: Any = {"type": "string"}
    for size in range(14):
        chain = {"anyOf": [chain], "pattern": f"^(.*a.{{{size}}})$"}
    assert "anyOf" in _refusal(chain)


@pytest.mark.parametrize(
    "reference",
    [
        "#/examples/0",
        "#/%65xamples/0",
        "#/items/default",
        "#/properties/properties/enum/0",
        "http://x/#/examples/0",
    ],
)
def test_a_reference_leads_to_nothing_that_was_not_looked_at(reference: str) -> None:
    hidden = {"allOf": [{"type": "string", "pattern": f"^(.*a.{{{size}}})$"} for size in range(9)]}
    schema = {
        "$id": "http://x/",
        "items": {"$ref": reference, "default": hidden},
        "examples": [hidden],
        "properties": {"properties": {"enum": [hidden]}},
    }
    assert "$ref" in _refusal(schema)


@pytest.mark.parametrize("regex", ["(", "(?=a)", r"(a)\1", "a(?!b)", "(?:" * 300 + ")" * 300])
def test_expressions_that_are_refused(regex: str) -> None:
    with pytest.raises(GrammarError) as refused:
        constraint_of({"structured_outputs": {"regex": regex}})
    assert refused.value.param == "structured_outputs.regex"
    # A message repeats nothing of what was sent.
    assert regex not in str(refused.value)


def test_choices_are_taken_literally() -> None:
    found = constraint_of({"structured_outputs": {"choice": ["a.b", "(c"]}})
    assert found is not None
    assert found.param == "structured_outputs.choice"
