"""What an answer must look like: the constraint in a job's body, and which of them are refused.

Both sides of the queue read it: the API refuses what can't be followed before there is a job, and
a worker compiles the same text for its model. The grammars are llguidance's (docs/decisions/0011).

A schema or an expression comes from a stranger, so its size is bounded here, and how much work the
library may do with it in `parser_limits`. That doesn't bound the intersections of expressions that
it makes of nested schemas, so a schema that would make many of them is refused before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import orjson
from llguidance import LLMatcher, LLParserLimits

#: Bytes of a schema as compact JSON; one of this size takes tens of milliseconds to compile.
MAX_SCHEMA_BYTES: Final = 16 * 1024
#: Objects and lists inside each other; the library takes about 60.
MAX_SCHEMA_DEPTH: Final = 32
#: Of one schema: the names that each allows have to be told apart from all others.
MAX_PATTERN_PROPERTIES: Final = 8
#: Characters of an expression.
MAX_REGEX: Final = 2048
MAX_CHOICES: Final = 256

#: As `json.dumps` writes it, which models have seen most of. With free white space small models
#: write nothing else until they are cut off.
_JSON_STYLE: Final[Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
#: Says nothing about what is valid.
_ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$defs", "definitions", "$schema", "$id"}
)
#: Keys whose values name schemas; their own keys are the caller's.
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions")
#: Keys whose values are no schemas.
_VALUES: Final = ("enum", "const", "default", "examples")
#: What the library says, by its beginning, and what is told of it: nothing the caller wrote.
_REASONS: Final[Mapping[str, str]] = {
    "Unsatisfiable schema": "Nothing satisfies it.",
    "Unknown format": "It names a format that is not known.",
    "schema too large": "It is too complex.",
    "grammar size": "It is too complex.",
    "lexer error": "It is too complex.",
    "recursion limit": "It is nested too deeply.",
    "Unable to determine": "It is too complex.",
}
_UNSUPPORTED: Final = re.compile(r"Unimplemented keys: \[([A-Za-z\", $]{1,200})\]")


class GrammarError(ValueError):
    """A constraint that can't be followed; the message may be shown."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        #: Which part of the request it is.
        self.param = param


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one answer has to match."""

    #: The parameter it came from.
    param: str
    #: For `LLMatcher`.
    grammar: str


def parser_limits() -> LLParserLimits:
    """How much a grammar may cost: about 15 ms to begin with, and for one token at the very most.

    The states bound what all tokens of an answer cost together, and the memory it takes (some
    40 MB). A grammar that goes beyond ends its own answer.
    """
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=10_000,
        max_lexer_states=20_000,
        max_grammar_size=20_000,
        # Its texts would hold parts of the answer.
        verbose_errors=False,
    )


def constraint_of(body: Mapping[str, Any]) -> Constraint | None:
    """The constraint of a job's body. Raises `GrammarError` when it can't be followed."""
    wanted = body.get("response_format")
    if wanted is not None:
        if wanted["type"] == "json_object":
            return Constraint("response_format", _json_grammar({"type": "object"}))
        param = "response_format.json_schema.schema"
        return Constraint(param, checked_schema(wanted["json_schema"]["schema"], param))
    extension = body.get("structured_outputs")
    if extension is None:
        return None
    if "regex" in extension:
        param = "structured_outputs.regex"
        grammar = LLMatcher.grammar_from_regex(extension["regex"])
    else:
        param = "structured_outputs.choice"
        grammar = _choice_grammar(extension["choice"])
    _check(grammar, param)
    return Constraint(param, grammar)


def checked_schema(schema: Mapping[str, Any], param: str) -> str:
    """The grammar of a JSON schema. Raises `GrammarError`."""
    try:
        size = len(orjson.dumps(schema))
    except TypeError:
        raise GrammarError(
            "It is nested too deeply, or a number in it is too long.", param
        ) from None
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"It may have at most {MAX_SCHEMA_BYTES} bytes as JSON.", param)
    for part in _parts(schema, param):
        _check_part(part, param)
    grammar = _json_grammar(schema)
    _check(grammar, param)
    return grammar


def _json_grammar(schema: Mapping[str, Any]) -> str:
    text = orjson.dumps(schema).decode()
    return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE))


def _choice_grammar(choices: list[str]) -> str:
    return str(LLMatcher.grammar_from_regex("|".join(map(re.escape, choices))))


def _check(grammar: str, param: str) -> None:
    if (problem := _problem(grammar)) is not None:
        raise GrammarError(problem, param)


@lru_cache(maxsize=256)
def _problem(grammar: str) -> str | None:
    """Why the library can't follow it; most callers send the same schema again and again."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=parser_limits())
    if not failed:
        return None
    message = str(messages[0])
    if found := _UNSUPPORTED.match(message):
        return f"These keywords are not supported: {found[1].replace(chr(34), '')}."
    for beginning, reason in _REASONS.items():
        if message.startswith(beginning):
            return reason
    return "It can't be read, or it uses what is not supported."


def _parts(schema: Any, param: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Every schema inside a schema. Enumerated and constant values are none."""
    if depth > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"It may be nested {MAX_SCHEMA_DEPTH} deep at most.", param)
    if isinstance(schema, list):
        for entry in schema:
            yield from _parts(entry, param, depth + 1)
    elif isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, dict):
                for entry in value.values():
                    yield from _parts(entry, param, depth + 2)
            elif key not in _VALUES:
                yield from _parts(value, param, depth + 1)


def _leads_to_a_part(reference: Any) -> bool:
    """Whether a `$ref` can only name what `_parts` goes through: nothing else was checked.

    The library follows it anywhere, into examples too.
    """
    root, *keys = unquote(str(reference)).split("/")
    if root != "#":
        return False
    names = False
    for key in keys:
        if names:
            names = False
        elif key in _VALUES:
            return False
        else:
            names = key in _NAMED
    return True


def _check_part(part: Mapping[str, Any], param: str) -> None:
    if "x-guidance" in part:
        raise GrammarError("x-guidance is not supported.", param)
    if "allOf" in part:
        raise GrammarError("These keywords are not supported: allOf.", param)
    if "$ref" in part and not _leads_to_a_part(part["$ref"]):
        raise GrammarError("A $ref may only lead to a schema within it, by its path.", param)
    for key in ("$ref", "anyOf", "oneOf"):
        if key in part and not part.keys() <= _ANNOTATIONS | {key, "type"}:
            raise GrammarError(f"{key} can't be combined with other keywords.", param)
    if len(part.get("patternProperties") or ()) > MAX_PATTERN_PROPERTIES:
        raise GrammarError(f"It has more than {MAX_PATTERN_PROPERTIES} patternProperties.", param)
    if len(str(part.get("pattern", ""))) > MAX_REGEX:
        raise GrammarError(f"A pattern may have at most {MAX_REGEX} characters.", param)
