"""What the reference says of each route; a route without an entry fails the tests.

Whoever adds routes adds a table of `Call`s beside these, named `METHOD /path`, and puts it into
`CALLS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from api.reference.call import Call
from api.reference.file_calls import BATCHES, FILES
from api.reference.webhook_calls import WEBHOOKS
from api.schemas import answers as a
from api.schemas import conversations, dead_letters, jobs, responses
from api.schemas.usage import USAGE

_HI: Final = [{"role": "user", "content": "Name three rivers."}]
_CHAT: Final = {"model": "smollm2-135m", "messages": _HI, "max_tokens": 16}
_MAKES_JOBS: Final = ("Idempotency-Key", "Prefer")
_EVENTS: Final = "text/event-stream"

JOBS: Final[Mapping[str, Call]] = {
    "POST /v1/jobs": Call(
        tag="Jobs",
        summary="Submit a job",
        body=jobs.SUBMISSION,
        answers={202: a.JobObject, 200: a.JobObject},
        headers=_MAKES_JOBS,
        example={"endpoint": "/v1/chat/completions", "body": _CHAT, "priority": "standard"},
    ),
    "GET /v1/jobs": Call(
        tag="Jobs", summary="List jobs", query=jobs.LISTING, answers={200: a.JobPage}
    ),
    "GET /v1/jobs/{job_id}": Call(
        tag="Jobs",
        summary="Get a job, or wait for its end",
        query=jobs.WAIT,
        answers={200: a.JobObject, 304: None},
        headers=("If-None-Match",),
    ),
    "DELETE /v1/jobs/{job_id}": Call(
        tag="Jobs",
        summary="Cancel a job and erase its content",
        answers={200: a.Deleted, 202: a.Deleted},
    ),
    "GET /v1/jobs/{job_id}/events": Call(
        tag="Jobs",
        summary="Follow a job's events",
        query=jobs.FOLLOWING,
        answers={200: _EVENTS, 204: None},
        headers=("Last-Event-ID",),
    ),
    "POST /v1/jobs/{job_id}/cancel": Call(
        tag="Jobs", summary="Cancel a job", answers={200: a.JobObject, 202: a.JobObject}
    ),
    "POST /v1/jobs/{job_id}/retry": Call(
        tag="Jobs",
        summary="Put a failed or expired job in again",
        body=jobs.RETRY,
        body_optional=True,
        answers={202: a.JobObject},
    ),
    "POST /v1/jobs/cancel": Call(
        tag="Jobs",
        summary="Cancel many jobs",
        body=jobs.CANCELS,
        answers={200: a.CancelledPage},
        example={"ids": ["job_01m87078gkaq486xjy5pjqpvmz"]},
    ),
    "GET /v1/queues": Call(
        tag="Jobs", summary="Your part of each queue", answers={200: a.QueuePage}
    ),
    "GET /v1/usage": Call(
        tag="Jobs",
        summary="Ended jobs and their tokens by hour and model",
        query=USAGE,
        answers={200: a.UsagePage},
    ),
}

OPENAI: Final[Mapping[str, Call]] = {
    "POST /v1/chat/completions": Call(
        tag="OpenAI",
        summary="Chat",
        body=jobs.CHAT,
        answers={200: a.ChatCompletion, 202: a.JobObject},
        streams=True,
        headers=_MAKES_JOBS,
        example=_CHAT,
    ),
    "POST /v1/completions": Call(
        tag="OpenAI",
        summary="Complete a text",
        body=jobs.COMPLETION,
        answers={200: a.TextCompletion, 202: a.JobObject},
        streams=True,
        headers=_MAKES_JOBS,
        example={"model": "smollm2-135m", "prompt": "Once upon a time", "max_tokens": 16},
    ),
    "POST /v1/embeddings": Call(
        tag="OpenAI",
        summary="Embed texts",
        body=jobs.EMBEDDING,
        answers={200: a.EmbeddingPage, 202: a.JobObject},
        headers=_MAKES_JOBS,
        example={"model": "all-minilm-l6-v2", "input": ["A river.", "A lake."]},
    ),
    "POST /v1/moderations": Call(
        tag="OpenAI",
        summary="Classify texts",
        body=jobs.MODERATION,
        answers={200: a.Moderations, 202: a.JobObject},
        headers=_MAKES_JOBS,
        example={"input": ["Have a nice day."]},
    ),
    "POST /v1/rerank": Call(
        tag="OpenAI",
        summary="Order documents by how well they answer a query (as Cohere and Jina have it)",
        body=jobs.RERANK,
        answers={200: a.Ranking, 202: a.JobObject},
        headers=_MAKES_JOBS,
        example={"model": "reranker", "query": "What is a lake?", "documents": ["A.", "B."]},
    ),
    "GET /v1/models": Call(tag="OpenAI", summary="List models", answers={200: a.ModelPage}),
    "GET /v1/models/{model}": Call(tag="OpenAI", summary="Get a model", answers={200: a.Model}),
}

_CONVERSATION: Final = "/v1/conversations/{conversation_id}"
RESPONSES: Final[Mapping[str, Call]] = {
    "POST /v1/responses": Call(
        tag="Responses",
        summary="Create a response",
        body=responses.RESPONSE,
        answers={200: a.ResponseObject},
        streams=True,
        headers=_MAKES_JOBS,
        example={"model": "smollm2-135m", "input": "Name a river.", "max_output_tokens": 16},
    ),
    "GET /v1/responses/{response_id}": Call(
        tag="Responses",
        summary="Get a response, or go on with its stream",
        query=responses.RETRIEVAL,
        answers={200: a.ResponseObject},
        streams=True,
    ),
    "DELETE /v1/responses/{response_id}": Call(
        tag="Responses", summary="Delete a response", answers={200: a.Deleted}
    ),
    "POST /v1/responses/{response_id}/cancel": Call(
        tag="Responses", summary="Cancel a response", answers={200: a.ResponseObject}
    ),
    "GET /v1/responses/{response_id}/input_items": Call(
        tag="Responses",
        summary="List what a response was asked",
        query=responses.ITEM_LISTING,
        answers={200: a.ItemPage},
    ),
    "POST /v1/conversations": Call(
        tag="Conversations",
        summary="Create a conversation",
        body=conversations.NEW,
        body_optional=True,
        headers=("Idempotency-Key",),
        answers={200: a.ConversationObject},
        example={"items": [{"role": "user", "content": "My name is Ada."}]},
    ),
    f"GET {_CONVERSATION}": Call(
        tag="Conversations", summary="Get a conversation", answers={200: a.ConversationObject}
    ),
    f"POST {_CONVERSATION}": Call(
        tag="Conversations",
        summary="Replace a conversation's metadata",
        body=conversations.UPDATE,
        answers={200: a.ConversationObject},
    ),
    f"DELETE {_CONVERSATION}": Call(
        tag="Conversations", summary="Delete a conversation", answers={200: a.Deleted}
    ),
    f"GET {_CONVERSATION}/items": Call(
        tag="Conversations",
        summary="List items",
        query=responses.ITEM_LISTING,
        answers={200: a.ItemPage},
    ),
    f"POST {_CONVERSATION}/items": Call(
        tag="Conversations",
        summary="Add items",
        body=conversations.NEW_ITEMS,
        answers={200: a.ItemPage},
    ),
    f"GET {_CONVERSATION}/items/{{item_id}}": Call(
        tag="Conversations", summary="Get an item", answers={200: a.Item}
    ),
    f"DELETE {_CONVERSATION}/items/{{item_id}}": Call(
        tag="Conversations", summary="Delete an item", answers={200: a.ConversationObject}
    ),
}

_ADMIN: Final = "Operations"
OPERATIONS: Final[Mapping[str, Call]] = {
    "GET /v1/dead_letters": Call(
        tag=_ADMIN,
        summary="List dead letters",
        query=dead_letters.SELECTION,
        answers={200: a.DeadLetterPage},
    ),
    "DELETE /v1/dead_letters": Call(
        tag=_ADMIN,
        summary="Drop dead letters",
        query=dead_letters.PURGE,
        answers={200: a.Purged},
    ),
    "POST /v1/dead_letters/replay": Call(
        tag=_ADMIN,
        summary="Put jobs of dead letters in again",
        query=dead_letters.REPLAY,
        answers={200: a.Replayed},
    ),
    "GET /v1/dead_letters/{job_id}": Call(
        tag=_ADMIN, summary="Get a dead letter", answers={200: a.DeadLetterObject}
    ),
    "DELETE /v1/dead_letters/{job_id}": Call(
        tag=_ADMIN, summary="Drop a dead letter", answers={200: a.Purged}
    ),
    "POST /v1/dead_letters/{job_id}/replay": Call(
        tag=_ADMIN, summary="Put its job in again", answers={200: a.Replayed}
    ),
    "GET /metrics": Call(tag=_ADMIN, summary="Prometheus metrics", answers={200: "text/plain"}),
    "GET /healthz": Call(tag=_ADMIN, summary="The process answers", answers={200: a.Alive}),
    "GET /readyz": Call(
        tag=_ADMIN,
        summary="Jobs can be accepted and run",
        answers={200: a.Readiness, 503: a.Readiness},
    ),
    "GET /openapi.json": Call(
        tag=_ADMIN, summary="This document", answers={200: "application/json"}
    ),
    "GET /docs": Call(tag=_ADMIN, summary="This document to read", answers={200: "text/html"}),
    "GET /docs/{asset}": Call(
        tag=_ADMIN, summary="Files of the page", answers={200: "application/octet-stream"}
    ),
    "GET /console": Call(
        tag=_ADMIN, summary="Console of a tenant", answers={200: "text/html", 304: None}
    ),
    "GET /console/{asset}": Call(
        tag=_ADMIN,
        summary="Files of the console",
        answers={200: "application/octet-stream", 304: None},
    ),
}

CALLS: Final[Mapping[str, Call]] = {
    **JOBS,
    **OPENAI,
    **RESPONSES,
    **FILES,
    **BATCHES,
    **WEBHOOKS,
    **OPERATIONS,
}
