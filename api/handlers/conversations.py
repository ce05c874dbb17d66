"""`/v1/conversations`: what several responses and their callers said, in order."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import web

from api import keys
from api.delivery.attendance import REPLAYED
from api.errors import ApiError
from api.handlers.body import read_body
from api.handlers.intake import fingerprint_of, idempotency_key_of
from api.ports import Conversations, Queue
from api.schemas.conversations import NEW, NEW_ITEMS, UPDATE, conversation_object
from api.schemas.parsing import parse, parse_query
from api.schemas.response_object import (
    input_item,
    input_items,
    is_response,
    item_page,
    output_item,
    output_text,
)
from api.schemas.responses import ITEM_LISTING, InputItem, Message
from broker.conversations import (
    Conversation,
    ConversationNotFoundError,
    Item,
    Named,
    TooManyConversationsError,
)
from broker.errors import JobNotFoundError
from broker.jobs import Status, new_job_id

_ID: Final = re.compile(r"conv_[0-9a-hjkmnp-tv-z]{26}", re.ASCII)
#: Items one conversation may have.
MAX_ITEMS: Final = 2_000
#: A response that locked a conversation and was never seen is given up after this.
_LOST_MS: Final = 60_000


async def create(request: web.Request) -> web.Response:
    """`POST /v1/conversations`; with an idempotency key a repeat finds the first one."""
    raw = await read_body(request)
    wanted = parse(NEW, raw or b"{}")
    conversation = Conversation(
        id="conv_" + new_job_id().removeprefix("job_"),
        tenant=request[keys.PRINCIPAL].tenant,
        created_ms=time.time_ns() // 1_000_000,
        metadata=orjson.dumps(wanted.metadata or {}),
    )
    items = [_item(each) for each in wanted.items or ()]
    store, key = request.app[keys.CONVERSATIONS], idempotency_key_of(request)
    named = Named(key, fingerprint_of(request, raw)) if key else None
    try:
        first = await store.create(conversation, _stored(items), named)
    except TooManyConversationsError:
        most = request.app[keys.SETTINGS].api.max_conversations
        message = f"You may have {most} conversations; delete some."
        raise ApiError("too_many_conversations", message) from None
    if first == conversation.id:
        return _json(conversation_object(conversation))
    try:
        found = await store.get(first, conversation.tenant)
    except ConversationNotFoundError:
        raise ApiError("result_expired", "The conversation is gone.") from None
    return _json(conversation_object(found), REPLAYED)


async def fetch(request: web.Request) -> web.Response:
    """`GET /v1/conversations/{id}`."""
    return _json(conversation_object(await _find(request)))


async def update(request: web.Request) -> web.Response:
    """`POST /v1/conversations/{id}`: other metadata."""
    wanted = parse(UPDATE, await read_body(request))
    found = await _find(request)
    store = request.app[keys.CONVERSATIONS]
    await store.update(found.id, orjson.dumps(wanted.metadata or {}))
    return await fetch(request)


async def delete(request: web.Request) -> web.Response:
    """`DELETE /v1/conversations/{id}`, items and all; its responses stay."""
    found = await _find(request)
    await request.app[keys.CONVERSATIONS].delete(found.id, found.tenant)
    return _json({"id": found.id, "object": "conversation.deleted", "deleted": True})


async def list_items(request: web.Request) -> web.Response:
    """`GET /v1/conversations/{id}/items`."""
    wanted = parse_query(ITEM_LISTING, request.query)
    page = item_page(await _items(request), wanted)
    if page is None:
        raise ApiError("invalid_request", "It must be the id of an item.", param="after")
    return _json(page)


async def add_items(request: web.Request) -> web.Response:
    """`POST /v1/conversations/{id}/items`."""
    wanted = parse(NEW_ITEMS, await read_body(request))
    found = await _find(request)
    store = request.app[keys.CONVERSATIONS]
    items = [_item(each) for each in wanted.items]
    kept = await store.items(found.id)
    stored = _stored(items)
    size = sum(map(len, kept)) + sum(len(item) for _, item in stored)
    if len(kept) + len(items) > MAX_ITEMS or size > request.client_max_size:
        raise _full(request)
    await store.add(found.id, stored)
    page = {
        "object": "list",
        "data": items,
        "has_more": False,
        "first_id": items[0]["id"],
        "last_id": items[-1]["id"],
    }
    return _json(page)


async def fetch_item(request: web.Request) -> web.Response:
    """`GET /v1/conversations/{id}/items/{item_id}`."""
    for item in await _items(request):
        if item["id"] == request.match_info["item_id"]:
            return _json(item)
    raise _no_item()


async def delete_item(request: web.Request) -> web.Response:
    """`DELETE /v1/conversations/{id}/items/{item_id}`: answers with the conversation."""
    found = await _find(request)
    store = request.app[keys.CONVERSATIONS]
    if not await store.remove(found.id, request.match_info["item_id"]):
        raise _no_item()
    return _json(conversation_object(found))


@dataclass
class Claimed:
    """A conversation that a response is about to go on."""

    history: list[Message]
    _store: Conversations
    _queue: Queue
    _id: str
    _job_id: str = ""

    async def lock(self, job_id: str) -> None:
        """Raises `ApiError` when another response takes part."""
        if not await self._store.lock(self._id, job_id):
            raise _locked()
        self._job_id = job_id

    async def settle(self) -> None:
        """Unlock when the job was refused, or isn't made after all."""
        if not self._job_id:
            return
        try:
            await self._queue.get(self._job_id)
        except JobNotFoundError:
            await self._store.settle(self._id, self._job_id, ())


async def claim(request: web.Request, conversation_id: str) -> Claimed:
    """The conversation, with all that was said. Raises `ApiError`."""
    store, queue = request.app[keys.CONVERSATIONS], request.app[keys.QUEUE]
    try:
        found = await _settled(request, await _get(request, conversation_id))
    except ApiError as error:
        raise ApiError(error.code, error.message, param="conversation") from None
    if found.pending:
        raise _locked()
    items = await store.items(found.id)
    if len(items) >= MAX_ITEMS or sum(map(len, items)) > request.client_max_size:
        raise _full(request)
    history = [_message(orjson.loads(item)) for item in items]
    return Claimed(history, store, queue, found.id)


async def _find(request: web.Request) -> Conversation:
    found = await _get(request, request.match_info["conversation_id"])
    return await _settled(request, found)


async def _get(request: web.Request, conversation_id: str) -> Conversation:
    store = request.app[keys.CONVERSATIONS]
    try:
        if _ID.fullmatch(conversation_id):
            return await store.get(conversation_id, request[keys.PRINCIPAL].tenant)
    except ConversationNotFoundError:
        pass
    raise ApiError("not_found", "There is no such conversation.")


async def _settled(request: web.Request, found: Conversation) -> Conversation:
    """Take over what the response that took part has said, if it has ended."""
    if not found.pending:
        return found
    store, said = request.app[keys.CONVERSATIONS], []
    try:
        job = await request.app[keys.QUEUE].get(found.pending, tenant=found.tenant)
    except JobNotFoundError:
        # It is about to be enqueued, or never was.
        if time.time_ns() // 1_000_000 - _made_ms(found.pending) < _LOST_MS:
            return found
    else:
        if not job.is_terminal:
            return found
        if job.status is Status.COMPLETED and is_response(job):
            said = [*input_items(job), output_item(job.id, output_text(job), "completed")]
    await store.settle(found.id, found.pending, _stored(said))
    return await _get(request, found.id)


async def _items(request: web.Request) -> list[dict[str, Any]]:
    found = await _find(request)
    stored = await request.app[keys.CONVERSATIONS].items(found.id)
    return [orjson.loads(item) for item in stored]


def _made_ms(job_id: str) -> int:
    """The time in a job's id (see `new_job_id`)."""
    number = 0
    for letter in job_id.removeprefix("job_"):
        number = number << 5 | "0123456789abcdefghjkmnpqrstvwxyz".index(letter)
    return number >> 80


def _item(given: InputItem) -> dict[str, Any]:
    message = {"role": str(given["role"]), "content": str(given["content"])}
    return input_item("msg_" + new_job_id().removeprefix("job_"), message)


def _message(item: dict[str, Any]) -> Message:
    return {"role": item["role"], "content": "".join(part["text"] for part in item["content"])}


def _stored(items: Sequence[dict[str, Any]]) -> list[Item]:
    return [(item["id"], orjson.dumps(item)) for item in items]


def _locked() -> ApiError:
    return ApiError("conversation_locked")


def _full(request: web.Request) -> ApiError:
    limit = request.client_max_size
    message = f"A conversation may have {MAX_ITEMS} items and {limit} bytes."
    return ApiError("payload_too_large", message)


def _no_item() -> ApiError:
    return ApiError("not_found", "There is no such item.")


def _json(document: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    body = orjson.dumps(document)
    return web.Response(body=body, headers=headers, content_type="application/json")
