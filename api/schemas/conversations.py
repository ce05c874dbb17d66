"""`/v1/conversations`: requests, and the object."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field, TypeAdapter

from api.schemas.fields import Metadata, Schema
from api.schemas.responses import InputItem
from broker.conversations import Conversation

#: Items added by one call, as with OpenAI.
MAX_ADDED = 20

_Items = Annotated[list[InputItem], Field(max_length=MAX_ADDED)]


class NewConversation(Schema):
    items: _Items | None = None
    metadata: Metadata | None = None


class ConversationUpdate(Schema):
    metadata: Metadata | None = None


class NewItems(Schema):
    items: Annotated[_Items, Field(min_length=1)]


NEW = TypeAdapter(NewConversation)
UPDATE = TypeAdapter(ConversationUpdate)
NEW_ITEMS = TypeAdapter(NewItems)


def conversation_object(conversation: Conversation) -> dict[str, Any]:
    """For `orjson.dumps`."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_ms // 1000,
        "metadata": orjson.Fragment(conversation.metadata),
    }
