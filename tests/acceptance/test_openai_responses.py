"""Responses and conversations by the unmodified `openai` package."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from api import keys
from broker.jobs import Delta, Status
from tests.apiserver import CHAT, Api, eventually, serving
from tests.conftest import PATIENCE_S

TEXT = "one two three"


async def test_a_response(api: Api, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        model=CHAT,
        input="hi",
        instructions="Be short.",
        max_output_tokens=16,
        temperature=0.5,
        top_p=0.9,
        metadata={"a": "b"},
        service_tier="flex",
    )
    assert response.output_text == TEXT
    assert (response.status, response.service_tier) == ("completed", "flex")
    assert response.usage is not None
    assert response.usage.total_tokens == 8
    assert response.metadata == {"a": "b"}
    assert (response.instructions, response.max_output_tokens) == ("Be short.", 16)
    again = await client.responses.retrieve(response.id)
    assert again == response
    job = api.queue.get("job_" + response.id.removeprefix("resp_"))
    assert (job.endpoint, job.result_ttl_s) == ("/v1/responses", 604_800)


async def test_input_items_and_what_was_said_before(api: Api, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=CHAT, input="hi", instructions="One.")
    items: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
        {"type": "message", "role": "user", "content": "more"},
    ]
    second = await client.responses.create(
        model=CHAT, input=items, instructions="Two.", previous_response_id=first.id
    )
    assert second.previous_response_id == first.id
    body = api.queue.get("job_" + second.id.removeprefix("resp_")).body
    for text in (b'"Two."', b'"hi"', b'"one two three"', b'"rules"', b'"more"'):
        assert text in body
    assert b'"One."' not in body
    listed = [item async for item in client.responses.input_items.list(second.id, order="asc")]
    assert [(item.role, item.content[0].text) for item in listed] == [  # type: ignore[union-attr]
        ("system", "rules"),
        ("user", "more"),
    ]
    page = await client.responses.input_items.list(second.id, limit=1)
    assert page.has_more
    assert page.data[0].id == listed[1].id
    # What the API gave out may be sent back.
    back: Any = [listed[0].model_dump(exclude_none=True), first.output[0]]
    third = await client.responses.create(model=CHAT, input=[*back, items[1]])
    assert third.output_text == TEXT


async def _all(stream: Any) -> list[Any]:
    return [event async for event in stream]


async def test_a_stream_has_typed_events(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model=CHAT, input="hi", stream=True)
    events = await _all(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    assert events[-1].response.output_text == TEXT


async def test_the_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model=CHAT, input="hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == TEXT


async def test_in_the_background(api: Api, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model=CHAT, input="hold", background=True)
    assert response.status in ("queued", "in_progress")
    await api.worker.holding.wait()
    assert (await client.responses.retrieve(response.id)).status == "in_progress"
    api.worker.release()
    done = await client.responses.retrieve(response.id)
    assert (done.status, done.output_text) == ("completed", "held to the end")


async def test_resume_after_every_number(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model=CHAT, input="hi", stream=True, background=True)
    events = await _all(stream)
    assert [event.type for event in events[:2]] == ["response.created", "response.queued"]
    response_id = events[0].response.id
    for place, event in enumerate(events[:-1]):
        rest = await _all(
            await client.responses.retrieve(
                response_id, stream=True, starting_after=event.sequence_number
            )
        )
        said = [e.delta for e in events[place + 1 :] if e.type == "response.output_text.delta"]
        again = [e.delta for e in rest if e.type == "response.output_text.delta"]
        assert "".join(again) == "".join(said)
        assert [e for e in rest if "delta" not in e.type] == [
            e for e in events[place + 1 :] if "delta" not in e.type
        ]


async def test_resume_while_it_runs_on_another_process_beyond_the_log(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    """More pieces than the log holds, a reader that left early, and a second API."""
    stream = await client.responses.create(model=CHAT, input="hold", stream=True, background=True)
    events = []
    async for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    claim = api.worker.held[0]
    pieces = [f"{number} " for number in range(700)]
    for piece in pieces:
        delta = Delta(job_id=claim.job.id, attempt=claim.attempt, text=piece)
        assert api.queue.emit(CHAT, [delta]) == []
    app = api.app
    settings, hub, queue = app[keys.SETTINGS], app[keys.HUB], app[keys.QUEUE]
    async with (
        serving(settings, api.queue, queue, hub) as other,
        openai.AsyncOpenAI(base_url=other.url + "v1", api_key="a") as there,
    ):
        resumed = await there.responses.retrieve(
            claim.job.id.replace("job_", "resp_"),
            stream=True,
            starting_after=events[-1].sequence_number,
        )
        text = ""
        async for event in resumed:
            if event.type == "response.output_text.delta":
                text += event.delta
                if text.endswith("699 "):
                    break
        await resumed.close()
    assert text == "".join(pieces)
    assert api.queue.get(claim.job.id).status is Status.IN_PROGRESS


async def test_a_resumed_stream_survives_a_lost_worker(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model=CHAT, input="crash", stream=True)
    events = await _all(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    assert events[-1].type == "response.completed"


async def test_cancel_and_delete(api: Api, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model=CHAT, input="hold", background=True)
    await api.worker.holding.wait()
    assert (await client.responses.cancel(response.id)).status == "cancelled"
    await client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    job = api.queue.get("job_" + response.id.removeprefix("resp_"))
    assert (job.body, job.status) == (b"", Status.CANCELLED)


async def test_what_is_not_stored_is_erased_once_delivered(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    for stream in (False, True):
        answer: Any = await client.responses.create(
            model=CHAT, input="hi", store=False, stream=stream
        )
        response = (await _all(answer))[-1].response if stream else answer
        assert response.output_text == TEXT
        job_id = "job_" + response.id.removeprefix("resp_")
        await eventually(lambda job_id=job_id: api.queue.get(job_id).erased_ms)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)


async def test_leaving_a_stream_cancels_only_what_is_not_in_the_background(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    for background in (False, True):
        api.worker.holding.clear()
        stream = await client.responses.create(
            model=CHAT, input="hold", stream=True, background=background
        )
        await api.worker.holding.wait()
        await stream.close()
        job_id = api.worker.held[-1].job.id
        if background:
            await asyncio.sleep(0)
            assert api.queue.get(job_id).status is Status.IN_PROGRESS
        else:
            await eventually(lambda job_id=job_id: api.queue.get(job_id).status is Status.CANCELLED)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt_cache_key": "x"}, "prompt_cache_key"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "conversation"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "text", "text": "x", "detail": 1}]}]},
            "input.0.content",
        ),
        ({"input": [{"type": "function_call_output", "output": ""}]}, "input.0.type"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"input": ""}, "input"),
    ],
)
async def test_what_is_not_supported_is_named(
    client: openai.AsyncOpenAI, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**{"model": CHAT, "input": "hi", **changes})
    assert refused.value.param == param


async def test_errors_are_the_packages_exceptions(api: Api, client: openai.AsyncOpenAI) -> None:
    create = client.responses.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="nothing", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await create(model=CHAT, input="fail context_length_exceeded")
    with pytest.raises(openai.InternalServerError):
        await create(model=CHAT, input="fail out_of_memory")
    with pytest.raises(openai.NotFoundError) as before:
        await create(model=CHAT, input="hi", previous_response_id="resp_x")
    assert before.value.param == "previous_response_id"
    failed = await create(model=CHAT, input="fail out_of_memory", stream=True)
    last = (await _all(failed))[-1]
    assert (last.type, last.response.error.code) == ("response.failed", "out_of_memory")


async def test_anothers_responses_and_conversations_are_not_there(
    client: openai.AsyncOpenAI,
) -> None:
    response = await client.responses.create(model=CHAT, input="hi")
    conversation = await client.conversations.create(items=[{"role": "user", "content": "x"}])
    stranger = client.with_options(api_key="b")
    calls = (
        stranger.responses.retrieve(response.id),
        stranger.responses.cancel(response.id),
        stranger.responses.delete(response.id),
        stranger.responses.create(model=CHAT, input="hi", previous_response_id=response.id),
        stranger.responses.create(model=CHAT, input="hi", conversation=conversation.id),
        stranger.conversations.retrieve(conversation.id),
        stranger.conversations.delete(conversation.id),
        stranger.conversations.items.create(
            conversation.id, items=[{"role": "user", "content": "y"}]
        ),
    )
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            await call
    assert len((await client.conversations.items.list(conversation.id)).data) == 1


async def test_a_conversation(api: Api, client: openai.AsyncOpenAI) -> None:
    made = await client.conversations.create(
        metadata={"a": "b"}, items=[{"role": "system", "content": "rules"}]
    )
    assert made.metadata == {"a": "b"}
    changed = await client.conversations.update(made.id, metadata={"c": "d"})
    assert (changed.id, changed.metadata) == (made.id, {"c": "d"})
    first = await client.responses.create(model=CHAT, input="hi", conversation=made.id)
    assert first.conversation is not None
    assert first.conversation.id == made.id
    second = await client.responses.create(
        model=CHAT, input="hold", conversation={"id": made.id}, background=True
    )
    with pytest.raises(openai.ConflictError) as locked:
        await client.responses.create(model=CHAT, input="hi", conversation=made.id)
    assert locked.value.code == "conversation_locked"
    await api.worker.holding.wait()
    body = api.queue.get("job_" + second.id.removeprefix("resp_")).body
    for text in (b'"rules"', b'"hi"', b'"one two three"', b'"hold"'):
        assert text in body
    api.worker.release()
    items = [item async for item in client.conversations.items.list(made.id, order="asc")]
    said = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert said == ["rules", "hi", TEXT, "hold", "held to the end"]
    assert len({item.id for item in items}) == 5


async def test_items_of_a_conversation(client: openai.AsyncOpenAI) -> None:
    made = await client.conversations.create()
    added = await client.conversations.items.create(
        made.id, items=[{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    )
    first = added.data[0]
    assert first.id is not None
    assert await client.conversations.items.retrieve(first.id, conversation_id=made.id) == first
    await client.conversations.items.delete(first.id, conversation_id=made.id)
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.retrieve(first.id, conversation_id=made.id)
    deleted = await client.conversations.delete(made.id)
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.list(made.id)


async def test_conversations_of_a_tenant_are_bounded(api: Api, client: openai.AsyncOpenAI) -> None:
    made = [(await client.conversations.create()).id for _ in range(3)]
    with pytest.raises(openai.RateLimitError, match="have 3 conversations") as refused:
        await client.conversations.create()
    assert refused.value.code == "too_many_conversations"
    stranger = client.with_options(api_key="b")
    await stranger.conversations.create()
    # Going on with one makes none.
    await client.responses.create(model=CHAT, input="hi", conversation=made[1])
    await client.conversations.items.list(made[1])
    await client.conversations.delete(made[0])
    await client.conversations.create()
    with pytest.raises(openai.RateLimitError):
        await client.conversations.create()


async def test_a_refused_response_leaves_its_conversation_open(client: openai.AsyncOpenAI) -> None:
    made = await client.conversations.create()
    create = client.responses.create
    with pytest.raises(openai.BadRequestError):
        await create(model=CHAT, input="hi", conversation=made.id, max_output_tokens=10**6)
    with pytest.raises(openai.InternalServerError):
        await create(model=CHAT, input="fail out_of_memory", conversation=made.id)
    await create(model=CHAT, input="hi", conversation=made.id)
    assert len((await client.conversations.items.list(made.id)).data) == 2


async def test_the_synchronous_client(api: Api) -> None:
    def use() -> None:
        with openai.OpenAI(
            base_url=api.url + "v1", api_key="a", max_retries=0, timeout=PATIENCE_S
        ) as client:
            made = client.conversations.create()
            response = client.responses.create(model=CHAT, input="hi", conversation=made.id)
            assert client.responses.retrieve(response.id).output_text == TEXT
            events = list(client.responses.create(model=CHAT, input="hi", stream=True))
            assert events[-1].type == "response.completed"
            resumed = client.responses.retrieve(response.id, stream=True, starting_after=3)
            assert "delta" in next(iter(resumed)).type
            resumed.close()
            client.responses.delete(response.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.cancel(response.id)

    await asyncio.to_thread(use)


async def test_a_response_as_a_job(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=CHAT, input="hi")
    body = {"model": CHAT, "input": "more", "previous_response_id": first.id}
    job: Any = await client.post(
        "/jobs",
        body={"endpoint": "/v1/responses", "body": body},
        options={"headers": {"Prefer": "wait=9"}},
        cast_to=object,
    )
    response = await client.responses.retrieve(job["id"].replace("job_", "resp_"))
    assert job["output"] == response.model_dump(mode="json", exclude_unset=True)
    assert response.previous_response_id == first.id
    body = {"model": CHAT, "input": "more", "conversation": "conv_x"}
    submission = {"endpoint": "/v1/responses", "body": body}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.post("/jobs", body=submission, cast_to=object)
    assert refused.value.param == "body.conversation"


async def test_a_conversation_is_made_once_under_a_name(client: openai.AsyncOpenAI) -> None:
    named = {"Idempotency-Key": "chat 7"}
    said: Any = [{"role": "user", "content": "x"}]
    made = [await client.conversations.create(items=said, extra_headers=named) for _ in range(3)]
    assert len({each.id for each in made}) == 1
    assert [item.role async for item in client.conversations.items.list(made[0].id)] == ["user"]
    again = await client.conversations.with_raw_response.create(items=said, extra_headers=named)
    assert again.headers["Idempotent-Replayed"] == "true"
    with pytest.raises(openai.UnprocessableEntityError) as other:
        await client.conversations.create(extra_headers=named)
    assert other.value.code == "idempotency_key_reused"
    await client.conversations.delete(made[0].id)
    with pytest.raises(openai.APIStatusError) as gone:
        await client.conversations.create(items=said, extra_headers=named)
    assert (gone.value.status_code, gone.value.code) == (410, "result_expired")


async def test_a_response_of_a_conversation_is_made_once_under_a_name(
    api: Api, client: openai.AsyncOpenAI
) -> None:
    talk = await client.conversations.create()
    named = {"Idempotency-Key": "turn 1"}

    async def ask(text: str, **more: Any) -> Any:
        return await client.responses.create(
            model=CHAT, input=text, conversation=talk.id, extra_headers=named, **more
        )

    first = await ask("hold", background=True)
    await eventually(lambda: api.worker.held)
    # While the first one runs, and has the conversation for itself.
    assert (await ask("hold", background=True)).id == first.id
    with pytest.raises(openai.UnprocessableEntityError):
        await ask("something else")
    api.worker.release()
    async with asyncio.timeout(10):
        while (await client.responses.retrieve(first.id)).status != "completed":
            await asyncio.sleep(0.01)
    assert (await ask("hold", background=True)).id == first.id
    # The repeats have taken no place in it, and left no lock.
    following = await client.responses.create(model=CHAT, input="hi", conversation=talk.id)
    assert following.status == "completed"
    assert len((await client.conversations.items.list(talk.id, limit=100)).data) == 4


async def test_a_repeat_does_not_ask_for_what_went_before(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=CHAT, input="hi")

    async def go_on(key: str) -> Any:
        return await client.responses.create(
            model=CHAT,
            input="more",
            previous_response_id=first.id,
            extra_headers={"Idempotency-Key": key},
        )

    second = await go_on("a")
    await client.responses.delete(first.id)
    assert (await go_on("a")).id == second.id
    with pytest.raises(openai.NotFoundError):
        await go_on("b")
