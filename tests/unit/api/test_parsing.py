"""Bad bodies: one clear error that names the parameter and repeats nothing of what was sent."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from api.errors import ApiError
from api.schemas.inference import ChatRequest
from api.schemas.jobs import CHAT, COMPLETION, EMBEDDING, SUBMISSION
from api.schemas.parsing import parse
from config import catalogue

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def _chat(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def _content(value: Any) -> bytes:
    return _chat(messages=[{"role": "user", "content": value}])


def _refusal(raw: bytes, schema: Any = CHAT) -> tuple[str, str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(schema, raw)
    return caught.value.code, caught.value.param, caught.value.message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "a' + b"\x00" + b'"}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "m"} trailing',
    ],
)
def test_what_is_no_json_object(raw: bytes) -> None:
    code, param, message = _refusal(raw)
    assert (code, param) == ("invalid_request", None)
    assert "JSON" in message


@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b"9" * 400, b"1e999"])
def test_a_nul_is_found_beside_numbers_that_other_parsers_refuse(value: bytes) -> None:
    raw = _content("a\0")[:-1] + b', "audio": ' + value + b"}"
    code, param, _ = _refusal(raw)
    assert (code, param) == ("invalid_request", "messages.0.content")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{}", "model"),
        (_chat(model=7), "model"),
        (_chat(model=""), "model"),
        (_chat(messages=[]), "messages"),
        (_chat(messages="hi"), "messages"),
        (_chat(messages=[7]), "messages.0"),
        (_chat(messages=[{"role": "user"}]), "messages.0.content"),
        (_chat(messages=[{"content": "x"}]), "messages.0.role"),
        (_chat(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
        (_chat(messages=[*GOOD["messages"], {"role": "tool", "content": "x"}]), "messages.1.role"),
        (_content(7), "messages.0.content"),
        (_content(None), "messages.0.content"),
        (_content([]), "messages.0.content"),
        (_content(["a"]), "messages.0.content"),
        (_content([{"type": "text"}]), "messages.0.content"),
        (_content("a\0b"), "messages.0.content"),
        (_chat(user="\0"), "user"),
        (_chat(max_tokens=0), "max_tokens"),
        (_chat(max_tokens="7"), "max_tokens"),
        (_chat(max_tokens=7.0), "max_tokens"),
        (_chat(max_tokens=True), "max_tokens"),
        (_chat(max_completion_tokens=-1), "max_completion_tokens"),
        (_chat(temperature=-0.1), "temperature"),
        (_chat(temperature=2.1), "temperature"),
        (_chat(temperature=float("nan")), "temperature"),
        (_chat(temperature=float("inf")), "temperature"),
        (_chat(top_p=0), "top_p"),
        (_chat(top_p=1.1), "top_p"),
        (_chat(top_k=0), "top_k"),
        (_chat(stop=["a"] * 5), "stop"),
        (_chat(stop=""), "stop.0"),
        (_chat(stop=7), "stop"),
        (_chat(stream="yes"), "stream"),
        (_chat(stream_options=7), "stream_options"),
        (_chat(service_tier="gold"), "service_tier"),
        (_chat(priority="high"), "priority"),
        (_chat(metadata={"k": 1}), "metadata"),
        (_chat(metadata={"k" * 65: ""}), "metadata"),
        (_chat(metadata={"k": "v" * 513}), "metadata"),
        (_chat(metadata={str(n): "" for n in range(17)}), "metadata"),
        (_chat(user="u" * 257), "user"),
    ],
)
def test_a_bad_value_is_named(raw: bytes, param: str) -> None:
    code, found, _ = _refusal(raw)
    assert (code, found) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (_chat(messages=[{"role": "user", "content": "x", "name": "n"}]), "messages.0.name"),
        (_chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
         "messages.0.tool_calls"),
        (_content([{"type": "image_url", "image_url": {}}]), "messages.0.content"),
        (_content([{"type": "text", "text": "x", "cache": 1}]), "messages.0.content"),
        (_chat(stream_options={"frob": 1}), "stream_options.frob"),
    ],
)  # fmt: skip
def test_what_is_not_supported_within_a_parameter(raw: bytes, param: str) -> None:
    code, found, _ = _refusal(raw)
    assert (code, found) == ("unsupported_parameter", param)


JSON = {"type": "json_object"}


def _schema(schema: Any, **more: Any) -> dict[str, Any]:
    named = {"name": "answer", "schema": schema, **more}
    return {"type": "json_schema", "json_schema": named}


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"frobnicate": True}, "unsupported_parameter", "frobnicate"),
        ({"frobnicate": None}, "unsupported_parameter", "frobnicate"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs"),
        (
            {"response_format": JSON, "structured_outputs": {"regex": "a"}},
            "invalid_request",
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "("}}, "invalid_request", "structured_outputs.regex"),
        (
            {"response_format": _schema({"not": {}})},
            "invalid_request",
            "response_format.json_schema.schema",
        ),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        ({"priority": "batch", "service_tier": "default"}, "invalid_request", "priority"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_request", "max_completion_tokens"),
    ],
)
def test_objections_to_a_request_as_a_whole(changes: dict[str, Any], code: str, param: str) -> None:
    objection = parse(CHAT, _chat(**changes)).objection()
    assert objection is not None
    assert (objection.code, objection.param) == (code, param)


def test_values_that_change_nothing_pass_and_leave_no_trace() -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "seed": None,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "store": False,
        "temperature": None,
        "stop": None,
    }
    request = parse(CHAT, _chat(**neutral))
    assert request.objection() is None
    assert orjson.loads(request.to_body()) == GOOD


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": _schema(True)}, "response_format.json_schema.schema"),
        ({"response_format": _schema({}, name="a b")}, "response_format.json_schema.name"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a" * 3000}}, "structured_outputs.regex"),
    ],
)
def test_what_can_not_be_wished_for(changes: dict[str, Any], param: str) -> None:
    code, found, _ = _refusal(_chat(**changes))
    assert (code, found) == ("invalid_request", param)


def test_a_form_is_kept_in_the_body_as_it_came() -> None:
    form = _schema({"properties": {"a": {"const": None}}, "default": None}, strict=True)
    request = parse(CHAT, _chat(response_format=form, n=3, logprobs=True))
    assert request.objection() is None
    assert orjson.loads(request.to_body()) == GOOD | {
        "response_format": form,
        "n": 3,
        "logprobs": True,
    }


def test_each_answer_costs() -> None:
    spec = catalogue.load()["smollm2-135m"]
    one, three = (parse(CHAT, _chat(n=n, max_tokens=50)) for n in (1, 3))
    assert three.output_tokens(spec) == 3 * one.output_tokens(spec) == 150


def test_how_tokens_are_drawn_is_kept_in_the_body() -> None:
    drawn: dict[str, Any] = {
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "logit_bias": {"17": -100},
        "seed": -7,
    }
    request = parse(CHAT, _chat(**drawn))
    assert request.objection() is None
    assert orjson.loads(request.to_body()) == GOOD | drawn


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"17": 101}}, "logit_bias.17"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
    ],
)
def test_bounds_of_how_tokens_are_drawn(changes: dict[str, Any], param: str) -> None:
    code, found, _ = _refusal(_chat(**changes))
    assert (code, found) == ("invalid_request", param)


def test_the_body_has_one_form_for_what_can_be_written_in_several() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(
        CHAT,
        _chat(
            messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts}],
            stop="x",
            max_completion_tokens=5,
            service_tier="flex",
            metadata={"a": "b"},
        ),
    )
    assert isinstance(request, ChatRequest)
    assert request.objection() is None
    assert orjson.loads(request.to_body()) == {
        "model": "m",
        "messages": [{"role": "system", "content": "d"}, {"role": "user", "content": "ab"}],
        "stop": ["x"],
        "max_tokens": 5,
    }


def test_an_answer_of_the_api_can_be_sent_back() -> None:
    said = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None,
            "audio": None, "function_call": None, "annotations": []}  # fmt: skip
    request = parse(CHAT, _chat(messages=[said]))
    assert orjson.loads(request.to_body())["messages"] == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("prompt", "kept"), [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])]
)
def test_prompts(prompt: Any, kept: Any) -> None:
    request = parse(COMPLETION, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert orjson.loads(request.to_body())["prompt"] == kept


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (["a", "b"], "unsupported_parameter"),
        ([[1], [2]], "unsupported_parameter"),
        ("", "invalid_request"),
        ([], "invalid_request"),
        ({}, "invalid_request"),
        (None, "invalid_request"),
    ],
)
def test_bad_prompts(prompt: Any, code: str) -> None:
    raw = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert _refusal(raw, COMPLETION)[:2] == (code, "prompt")


@pytest.mark.parametrize(
    ("value", "kept"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_embedding_inputs(value: Any, kept: Any) -> None:
    request = parse(EMBEDDING, json.dumps({"model": "m", "input": value}).encode())
    assert orjson.loads(request.to_body())["input"] == kept


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "input.0"),
        ([], "input"),
        ({}, "input"),
        (["a", ""], "input.1"),
        (["a", 1], "input.1"),
        ([[1], ["a"]], "input.1.0"),
        ([[1, -1]], "input.0.1"),
        ([2**31], "input.0.0"),
        (["a"] * 2049, "input"),
    ],
)
def test_bad_embedding_inputs(value: Any, param: str) -> None:
    raw = json.dumps({"model": "m", "input": value}).encode()
    assert _refusal(raw, EMBEDDING)[:2] == ("invalid_request", param)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"endpoint": None}, "invalid_request", "endpoint"),
        ({"endpoint": "/v1/frob"}, "invalid_request", "endpoint"),
        ({"endpoint": ["/v1/embeddings"]}, "invalid_request", "endpoint"),
        ({"body": None}, "invalid_request", "body"),
        ({"body": GOOD | {"max_tokens": 0}}, "invalid_request", "body.max_tokens"),
        ({"deadline": 30}, "invalid_request", "deadline"),
        ({"deadline": 1_800_000_000_000}, "invalid_request", "deadline"),
        ({"deadline": True}, "invalid_request", "deadline"),
        ({"deadline": "tomorrow"}, "invalid_request", "deadline"),
        ({"deadline": "2027-01-31"}, "invalid_request", "deadline"),
        ({"deadline": "2027-01-31T12:00:00"}, "invalid_request", "deadline"),
        ({"deadline": "9999-12-31T23:59:59Z"}, "invalid_request", "deadline"),
        ({"execution_timeout": 0}, "invalid_request", "execution_timeout"),
        ({"execution_timeout": 86_401}, "invalid_request", "execution_timeout"),
        ({"delay": -1}, "invalid_request", "delay"),
        ({"delay": 604_801}, "invalid_request", "delay"),
        ({"webhook": {"events": ["job.failed"]}}, "invalid_request", "webhook.url"),
        ({"[x]": 5}, "unsupported_parameter", "[x]"),
        ({"ttl": 0}, "invalid_request", "ttl"),
        ({"ttl": 10**9}, "invalid_request", "ttl"),
        ({"max_attempts": 0}, "invalid_request", "max_attempts"),
        ({"tenant": "ten_other"}, "unsupported_parameter", "tenant"),
    ],
)
def test_bad_submissions(changes: dict[str, Any], code: str, param: str) -> None:
    payload = {"endpoint": "/v1/chat/completions", "body": GOOD} | changes
    assert _refusal(json.dumps(payload).encode(), SUBMISSION)[:2] == (code, param)


@pytest.mark.parametrize(
    "deadline",
    [1_800_000_000, 1_800_000_000.0, "2027-01-15T08:00:00Z", "2027-01-15T09:30:00+01:30"],
)
def test_a_deadline_is_a_moment(deadline: Any) -> None:
    payload = {"endpoint": "/v1/chat/completions", "body": GOOD, "deadline": deadline}
    assert parse(SUBMISSION, json.dumps(payload).encode()).deadline == 1_800_000_000


def test_no_message_repeats_what_was_sent() -> None:
    canary = "canary-5b1d"
    bodies = [
        _chat(model={canary: canary}),
        _chat(messages=[{"role": canary, "content": canary}]),
        _content({"text": canary}),
        _content([{"type": canary}]),
        _chat(metadata={canary * 7: canary}),
        _chat(service_tier=canary),
        f'{{"model": "{canary}'.encode(),
        f'{{"model": {canary}'.encode(),
    ]
    for raw in bodies:
        _, param, message = _refusal(raw)
        assert canary not in message
        assert canary not in (param or "")


def test_a_flood_of_problems_is_not_told_one_by_one() -> None:
    raw = json.dumps(
        {"endpoint": "/v1/chat/completions", "body": GOOD} | {f"x{n}": n for n in range(5000)}
    ).encode()
    code, param, message = _refusal(raw, SUBMISSION)
    assert (code, param) == ("invalid_request", None)
    assert "100" in message


def test_an_escaped_backslash_is_no_nul() -> None:
    request = parse(CHAT, rb'{"model":"m","messages":[{"role":"user","content":"\\u0000"}]}')
    assert b"u0000" in request.to_body()


def test_odd_but_honest_text_passes() -> None:
    text = "\u0007\u200f𝔘𝔫𝔦 \U0001f9ea <|im_end|>\n\tend"
    assert orjson.loads(parse(CHAT, _content(text)).to_body())["messages"][0]["content"] == text
