"""The unmodified `openai` package against a running API, on the in-memory queue and on Valkey."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from broker.jobs import Status
from tests.apiserver import ALL_KINDS, CHAT, EMBED, MODERATOR, RERANKER, Api, eventually
from tests.conftest import PATIENCE_S

HI: list[Any] = [{"role": "user", "content": "hi"}]


def _ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_chat(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model=CHAT, messages=HI, max_tokens=16, temperature=0.5, top_p=0.9, stop=["x"], user="u"
    )
    assert completion.choices[0].message.content == "one two three"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 8
    assert completion.id.startswith("chatcmpl-")
    again = await client.chat.completions.create(
        model=CHAT,
        messages=[completion.choices[0].message, *HI],  # type: ignore[list-item]
    )
    assert again.choices[0].message.role == "assistant"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=CHAT, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one two three"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_stream_helper_of_the_sdk(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=CHAT, messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two three"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model=CHAT, prompt="hi", max_tokens=4)
    assert completion.choices[0].text == "one two three"
    stream = await client.completions.create(model=CHAT, prompt="hi", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == "one two three"


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model=EMBED, input=["a", "b"], encoding_format="float")
    assert [row.embedding for row in answer.data] == [[0.0, 0.5], [1.0, 0.5]]


async def test_moderations(client: openai.AsyncOpenAI) -> None:
    answer = await client.moderations.create(input=["all is well", "a bad thing"])
    assert answer.model == MODERATOR
    assert answer.id.startswith("modr-")
    assert [row.flagged for row in answer.results] == [False, True]
    shown = answer.results[1].model_dump(exclude_unset=True)
    assert (shown["categories"], shown["category_scores"]) == ({"bad": True}, {"bad": 0.9})
    parts: Any = [{"type": "text", "text": "a bad"}, {"type": "text", "text": " part"}]
    named = await client.moderations.create(model=MODERATOR, input=parts)
    assert [row.flagged for row in named.results] == [True]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.moderations.create(model=CHAT, input="x")
    assert refused.value.param == "model"


async def test_rerank(client: openai.AsyncOpenAI) -> None:
    """No call of the SDK's, but its client takes any."""
    body = {"model": RERANKER, "query": "q", "documents": ["a", "ccc", {"text": "bb"}], "top_n": 2}
    answer: Any = await client.post("/rerank", body=body, cast_to=object)
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.03},
        {"index": 2, "relevance_score": 0.02},
    ]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert {model.id async for model in client.models.list()} == set(ALL_KINDS)
    assert (await client.models.retrieve(CHAT)).owned_by == "forebay"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing")


async def test_exceptions(client: openai.AsyncOpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="no-such", messages=HI)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model=CHAT, messages=HI, temperature=9)
    assert (bad.value.code, bad.value.param) == ("invalid_request", "temperature")
    with pytest.raises(openai.BadRequestError) as unsupported:
        await create(model=CHAT, messages=HI, extra_body={"tools": [{"type": "function"}]})
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.PermissionDeniedError) as not_allowed:
        await create(model=CHAT, messages=HI, logprobs=True)
    assert (not_allowed.value.code, not_allowed.value.param) == (
        "parameter_not_allowed",
        "logprobs",
    )
    with pytest.raises(openai.BadRequestError) as too_long:
        await create(model=CHAT, messages=_ask("fail context_length_exceeded"))
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.ConflictError):
        await create(model=CHAT, messages=_ask("fail cancelled"))
    with pytest.raises(openai.InternalServerError):
        await create(model=CHAT, messages=_ask("fail out_of_memory"))
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError):
        await client.with_options(api_key="admin").models.list()


async def test_an_error_in_the_middle_of_a_stream_is_raised(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=CHAT, messages=_ask("diverge"), stream=True)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "worker_lost"


async def test_leaving_a_stream_cancels_its_job(api: Api, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=CHAT, messages=_ask("hold"), stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    job_id = api.worker.held[0].job.id
    await eventually(lambda: api.queue.get(job_id).status is Status.CANCELLED)


async def test_a_timeout_of_the_client_cancels_its_job(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(model=CHAT, messages=_ask("hold"), timeout=0.5)
    job_id = api.worker.held[0].job.id
    await eventually(lambda: api.queue.get(job_id).status is Status.CANCELLED)


async def test_the_synchronous_client(api: Api) -> None:
    def use() -> None:
        with openai.OpenAI(
            base_url=api.url + "v1", api_key="a", max_retries=0, timeout=PATIENCE_S
        ) as client:
            completion = client.chat.completions.create(model=CHAT, messages=HI)
            assert completion.choices[0].message.content == "one two three"
            stream = client.chat.completions.create(model=CHAT, messages=HI, stream=True)
            text = "".join(c.choices[0].delta.content or "" for c in stream)
            assert text == "one two three"
            vectors = client.embeddings.create(model=EMBED, input="a", encoding_format="float")
            assert vectors.data[0].embedding == [0.0, 0.5]
            assert client.models.retrieve(EMBED).id == EMBED
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model=CHAT, messages=[])

    await asyncio.to_thread(use)


async def test_raw_responses_show_our_headers(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=CHAT, messages=HI)
    assert raw.headers["x-job-id"].startswith("job_")
    assert raw.headers["x-request-id"] == raw.request_id


async def test_service_tiers_are_echoed(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model=CHAT, messages=HI, service_tier="flex")
    assert completion.service_tier == "flex"


async def test_background_jobs_by_the_sdk(client: openai.AsyncOpenAI) -> None:
    job: Any = await client.post(
        "/jobs",
        body={"endpoint": "/v1/chat/completions", "body": {"model": CHAT, "messages": HI}},
        cast_to=object,
    )
    done: Any = await client.get(f"/jobs/{job['id']}?wait=10", cast_to=object)
    assert done["output"]["choices"][0]["message"]["content"] == "one two three"
