"""Forms, several answers and logprobs of a real model: in the engine, and by the openai package."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch
from prometheus_client import CollectorRegistry

from broker.jobs import Claim
from broker.leases import LeaseRegistry
from broker.memory import AsyncMemoryQueue, MemoryQueue
from broker.policies import TenantPolicy
from broker.results import MemoryHub
from config.settings import load
from tests.apiserver import CHAT, OWNER, Api, ready_worker, serving
from tests.integration.real_models import real_model
from workers.engine import EngineError, EngineRequest
from workers.engines.continuous import ContinuousEngine
from workers.loader import load_model
from workers.metrics import WorkerMetrics
from workers.publisher import DeltaPublisher
from workers.runner import Runner

pytestmark = pytest.mark.model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    PERSON,
    {"enum": ["red", 7, None, {"deep": [True]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "string", "pattern": "^[a-z]{3,9}$"}, {"type": "null"}]},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "number", "minimum": 0, "maximum": 9},
                    "left": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            },
            "leaf": {"type": "string", "format": "date"},
        },
    },
]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def engine() -> Iterator[ContinuousEngine]:
    spec, folder = real_model("smollm2-135m", dtype="float32", max_batch=16, cache_tokens=8192)
    engine = ContinuousEngine(spec, folder, threads=1)
    engine.start()
    yield engine
    engine.stop()


def _request(name: str, question: str = QUESTION, **body: Any) -> EngineRequest:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12} | body
    return EngineRequest(id=name, endpoint="/v1/chat/completions", body=body)


def _form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_answers_keep_to_their_schemas_and_nobody_elses(engine: ContinuousEngine) -> None:
    alone = engine.submit(_request("job_alone")).result(60)
    wanted = []
    for number, schema in enumerate(SCHEMAS):
        for temperature, more in ((0, {}), (1.3, {"seed": 5, "top_p": 0.95})):
            body: dict[str, Any] = {"temperature": temperature, "max_tokens": 100, **more}
            name = f"job_{number}_{temperature}"
            request = _request(name, "Answer in JSON.", response_format=_form(schema), **body)
            wanted.append((schema, engine.submit(request)))
    beside = engine.submit(_request("job_beside"))
    for schema, future in wanted:
        result = future.result(60)
        assert result.finish_reason == "stop"
        checks = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(result.text), schema, format_checker=checks)
    # Greedy and float32: the same to the last bit.
    assert beside.result(60).text == alone.text
    assert beside.result().usage.output_tokens == alone.usage.output_tokens


@pytest.mark.parametrize("regex", [r"\d{3}-[A-F]{4}", r"(yes|no), because [a-z ]{5,20}\."])
def test_an_expression_matches_the_whole_answer(engine: ContinuousEngine, regex: str) -> None:
    form = {"regex": regex}
    bodies: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.1, "presence_penalty": 1.5},
        {"repetition_penalty": 1.3, "logit_bias": {"34": -100}, "logprobs": True},
    ]
    futures = [
        engine.submit(_request(f"job_{at}", structured_outputs=form, max_tokens=60, **body))
        for at, body in enumerate(bodies)
    ]
    for future in futures:
        assert re.fullmatch(regex, future.result(60).text)


def test_an_answer_that_is_cut_says_so(engine: ContinuousEngine) -> None:
    form = {"type": "json_object"}
    result = engine.submit(_request("job_1", response_format=form, max_tokens=1)).result(60)
    assert (result.finish_reason, result.text[:1]) == ("length", "{")


def test_a_form_that_costs_too_much_fails_alone(engine: ContinuousEngine) -> None:
    alone = engine.submit(_request("job_alone")).result(60)
    form = {"regex": r"(.{1,50}[aeiou]){1,500}x"}
    hostile = [engine.submit(_request(f"job_{at}", structured_outputs=form)) for at in range(4)]
    beside = engine.submit(_request("job_beside"))
    for future in hostile:
        with pytest.raises(EngineError) as refused:
            future.result(60)
        assert (refused.value.code, refused.value.param) == (
            "invalid_request",
            "structured_outputs.regex",
        )
    assert beside.result(60).text == alone.text


def test_logprobs_are_those_of_the_model(engine: ContinuousEngine) -> None:
    """Whatever is done to the scores before a token is drawn."""
    body = {"temperature": 1.2, "seed": 3, "presence_penalty": 1.0, "logit_bias": {"34": 2}}
    request = _request("job_1", logprobs=True, top_logprobs=3, **body)
    result = engine.submit(request).result(60)
    prompt = engine._prompts.chat([{"role": "user", "content": QUESTION}])
    assert result.logprobs is not None
    said = engine._prompts.text("".join(entry["token"] for entry in result.logprobs))
    assert len(said) == len(result.logprobs)
    # One of its own: the engine lets go of weights it has packed.
    reference = load_model(
        engine._spec, engine._folder, dtype=torch.float32, where=torch.device("cpu")
    )
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + said])).logits[0].float()
    expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    for row, token, entry in zip(expected, said, result.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=2e-3)
        best = row.topk(3)
        tops = [engine._prompts.template.decode([each]) for each in best.indices.tolist()]
        assert [top["token"] for top in entry["top_logprobs"]] == tops
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == pytest.approx(best.values.tolist(), abs=2e-3)


def test_several_answers_share_the_prompt_and_repeat_by_seed(engine: ContinuousEngine) -> None:
    question = "Tell me a story about " + "a very old king and " * 12
    body: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 8}
    first = engine.submit(_request("job_1", question, **body)).result(60)
    again = engine.submit(_request("job_2", question, **body)).result(60)
    texts = [first.text, *(other.text for other in first.others)]
    assert len(set(texts)) == 3
    assert [again.text, *(other.text for other in again.others)] == texts
    alone = engine.submit(_request("job_3", question, temperature=1.2, seed=8)).result(60)
    assert alone.text == first.text
    assert first.usage.output_tokens == 3 * 12
    assert first.usage.input_tokens == alone.usage.input_tokens


# -- by the openai package, through the API, a worker's runner and the engine ----------------------
@pytest.fixture
async def api(engine: ContinuousEngine) -> AsyncIterator[Api]:
    settings = load(_env_file=None)
    memory = MemoryQueue(settings.queue)
    hub = MemoryHub(memory)
    await hub.start()
    registry = LeaseRegistry(
        memory, queue_name=CHAT, owner=OWNER, ttl_s=30, renew_every_s=5,
        status=lambda: ready_worker(CHAT), healthy=lambda: True,
    )  # fmt: skip
    registry.start()
    publisher = DeltaPublisher(memory, CHAT, interval_s=0.01)
    publisher.start()
    runner = Runner(
        engine=engine, registry=registry, queue=memory, publisher=publisher,
        metrics=WorkerMetrics(CHAT, "transformers", CollectorRegistry()),
    )  # fmt: skip

    def work(claim: Claim) -> None:
        registry.add([claim])
        threading.Thread(target=runner.run, args=(claim.job.id,)).start()

    async with serving(settings, memory, AsyncMemoryQueue(memory), hub) as running:
        running.worker._work = work  # type: ignore[method-assign]
        running.accounts.change("a", policy=TenantPolicy(allow_logprobs=True))
        yield running
    publisher.stop()
    registry.stop()
    await hub.stop()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="a", base_url=f"{api.url}v1", max_retries=0) as client:
        yield client


ASK: list[Any] = [{"role": "user", "content": QUESTION}]


async def test_a_schema_by_the_openai_package(client: openai.AsyncOpenAI) -> None:
    form: Any = _form(PERSON)
    form["json_schema"]["strict"] = True
    chat = await client.chat.completions.create(
        model=CHAT, messages=ASK, response_format=form, max_tokens=100, temperature=0
    )
    jsonschema.validate(json.loads(chat.choices[0].message.content or ""), PERSON)
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": PERSON}}
    response = await client.responses.create(
        model=CHAT, input=QUESTION, text=text, max_output_tokens=100, temperature=0
    )
    jsonschema.validate(json.loads(response.output_text), PERSON)
    assert response.text is not None
    assert response.text.model_dump(exclude_none=True, by_alias=True) == text
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    completion = await client.completions.create(model=CHAT, prompt="Is it?", extra_body=extra)
    assert completion.choices[0].text in ("yes", "no")


async def test_several_answers_and_logprobs_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {
        "model": CHAT, "messages": ASK, "n": 2, "temperature": 1.2, "seed": 4, "max_tokens": 8,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = await client.chat.completions.create(**body)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    texts, logprobs = ["", ""], [[], []]  # type: ignore[var-annotated]
    reasons: list[Any] = [None, None]
    stream = await client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.content or []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice, streamed in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert [entry.token for entry in streamed] == [
            entry.token for entry in choice.logprobs.content or []
        ]
        assert "".join(entry.token for entry in streamed) == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in streamed)


async def test_logprobs_of_a_completion(client: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {
        "model": CHAT, "prompt": "The capital of France is", "max_tokens": 5, "temperature": 0,
        "logprobs": 2,
    }  # fmt: skip
    whole = await client.completions.create(**body)
    found = whole.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == whole.choices[0].text
    offsets, tokens = [], []
    async for chunk in await client.completions.create(**body, stream=True):
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset or []
            tokens += chunk.choices[0].logprobs.tokens or []
    assert (tokens, offsets) == (found.tokens, found.text_offset)


async def test_what_the_events_of_such_a_job_show(api: Api, client: openai.AsyncOpenAI) -> None:
    body = {"model": CHAT, "messages": ASK, "n": 2, "stream": True, "max_tokens": 4}
    submitted = await api.client.post(
        "/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": body}
    )
    job = await submitted.json()
    events = await api.client.get(job["urls"]["events"])
    datas = [json.loads(x[6:]) for x in (await events.text()).splitlines() if x[:6] == "data: "]
    texts = ["", ""]
    for data in datas:
        for piece in data.get("pieces", []):
            texts[piece["index"]] += piece["text"]
    choices = datas[-1]["job"]["output"]["choices"]
    assert texts == [choice["message"]["content"] for choice in choices]


async def test_logprobs_only_where_the_tenant_may(api: Api, client: openai.AsyncOpenAI) -> None:
    api.accounts.change("a", policy=TenantPolicy())
    with pytest.raises(openai.PermissionDeniedError) as refused:
        await client.chat.completions.create(model=CHAT, messages=ASK, logprobs=True)
    assert (refused.value.code, refused.value.param) == ("parameter_not_allowed", "logprobs")
