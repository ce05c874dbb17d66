"""The whole URL table. Every route declares who may call it; one that doesn't can't be written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import hdrs, web

from api.auth.principal import SCOPES
from api.handlers import (
    batches,
    console,
    conversations,
    dead_letters,
    events,
    files,
    inference,
    jobs,
    models,
    operations,
    queues,
    reference,
    responses,
    submission,
    usage,
    webhooks,
)
from api.handlers.body import expect

#: Instead of a scope: anybody may call this, without a credential.
PUBLIC: Final = "public"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    handler: Handler
    #: `PUBLIC` or one of `api.auth.principal.SCOPES`.
    scope: str
    #: Answer to `Expect: 100-continue`.
    expect: Callable[[web.Request], Awaitable[None]] = expect

    def __post_init__(self) -> None:
        if self.scope != PUBLIC and self.scope not in SCOPES:
            raise ValueError(f"{self.method} {self.path} declares no known scope")


ROUTES: Final = (
    Route(hdrs.METH_POST, "/v1/jobs", submission.submit, "jobs"),
    Route(hdrs.METH_GET, "/v1/jobs", jobs.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/jobs/{job_id}", jobs.fetch, "jobs"),
    Route(hdrs.METH_GET, "/v1/jobs/{job_id}/events", events.events, "jobs"),
    Route(hdrs.METH_DELETE, "/v1/jobs/{job_id}", jobs.delete, "jobs"),
    Route(hdrs.METH_POST, "/v1/jobs/{job_id}/cancel", jobs.cancel, "jobs"),
    Route(hdrs.METH_POST, "/v1/jobs/{job_id}/retry", jobs.retry, "jobs"),
    Route(hdrs.METH_POST, "/v1/jobs/cancel", jobs.cancel_many, "jobs"),
    Route(hdrs.METH_POST, "/v1/chat/completions", inference.chat, "jobs"),
    Route(hdrs.METH_POST, "/v1/completions", inference.completion, "jobs"),
    Route(hdrs.METH_POST, "/v1/embeddings", inference.embedding, "jobs"),
    Route(hdrs.METH_POST, "/v1/moderations", inference.moderation, "jobs"),
    Route(hdrs.METH_POST, "/v1/rerank", inference.rerank, "jobs"),
    Route(hdrs.METH_POST, "/v1/responses", responses.create, "jobs"),
    Route(hdrs.METH_GET, "/v1/responses/{response_id}", responses.fetch, "jobs"),
    Route(hdrs.METH_DELETE, "/v1/responses/{response_id}", responses.delete, "jobs"),
    Route(hdrs.METH_POST, "/v1/responses/{response_id}/cancel", responses.cancel, "jobs"),
    Route(hdrs.METH_GET, "/v1/responses/{response_id}/input_items", responses.list_inputs, "jobs"),
    Route(hdrs.METH_POST, "/v1/conversations", conversations.create, "jobs"),
    Route(hdrs.METH_GET, "/v1/conversations/{conversation_id}", conversations.fetch, "jobs"),
    Route(hdrs.METH_POST, "/v1/conversations/{conversation_id}", conversations.update, "jobs"),
    Route(hdrs.METH_DELETE, "/v1/conversations/{conversation_id}", conversations.delete, "jobs"),
    Route(
        hdrs.METH_GET, "/v1/conversations/{conversation_id}/items", conversations.list_items, "jobs"
    ),
    Route(
        hdrs.METH_POST, "/v1/conversations/{conversation_id}/items", conversations.add_items, "jobs"
    ),
    Route(
        hdrs.METH_GET,
        "/v1/conversations/{conversation_id}/items/{item_id}",
        conversations.fetch_item,
        "jobs",
    ),
    Route(
        hdrs.METH_DELETE,
        "/v1/conversations/{conversation_id}/items/{item_id}",
        conversations.delete_item,
        "jobs",
    ),
    Route(hdrs.METH_POST, "/v1/files", files.upload, "jobs", expect=files.expect_upload),
    Route(hdrs.METH_GET, "/v1/files", files.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/files/{file_id}", files.fetch, "jobs"),
    Route(hdrs.METH_DELETE, "/v1/files/{file_id}", files.delete, "jobs"),
    Route(hdrs.METH_GET, "/v1/files/{file_id}/content", files.content, "jobs"),
    Route(hdrs.METH_POST, "/v1/batches", batches.create, "jobs"),
    Route(hdrs.METH_GET, "/v1/batches", batches.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/batches/{batch_id}", batches.fetch, "jobs"),
    Route(hdrs.METH_POST, "/v1/batches/{batch_id}/cancel", batches.cancel, "jobs"),
    Route(hdrs.METH_GET, "/v1/queues", queues.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/usage", usage.fetch, "jobs"),
    Route(hdrs.METH_GET, "/v1/models", models.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/models/{model}", models.fetch, "jobs"),
    Route(hdrs.METH_GET, "/v1/webhook_event_types", webhooks.event_types, "jobs"),
    Route(hdrs.METH_POST, "/v1/webhook_endpoints", webhooks.create, "jobs"),
    Route(hdrs.METH_GET, "/v1/webhook_endpoints", webhooks.listing, "jobs"),
    Route(hdrs.METH_GET, "/v1/webhook_endpoints/{endpoint_id}", webhooks.fetch, "jobs"),
    Route(hdrs.METH_POST, "/v1/webhook_endpoints/{endpoint_id}", webhooks.change, "jobs"),
    Route(hdrs.METH_PATCH, "/v1/webhook_endpoints/{endpoint_id}", webhooks.change, "jobs"),
    Route(hdrs.METH_DELETE, "/v1/webhook_endpoints/{endpoint_id}", webhooks.delete, "jobs"),
    Route(
        hdrs.METH_POST, "/v1/webhook_endpoints/{endpoint_id}/rotate_secret", webhooks.rotate, "jobs"
    ),
    Route(hdrs.METH_POST, "/v1/webhook_endpoints/{endpoint_id}/test", webhooks.test, "jobs"),
    Route(
        hdrs.METH_GET, "/v1/webhook_endpoints/{endpoint_id}/deliveries", webhooks.deliveries, "jobs"
    ),
    Route(
        hdrs.METH_POST, "/v1/webhook_deliveries/{delivery_id}/redeliver", webhooks.redeliver, "jobs"
    ),
    Route(hdrs.METH_GET, "/v1/dead_letters", dead_letters.listing, "admin"),
    Route(hdrs.METH_DELETE, "/v1/dead_letters", dead_letters.purge_all, "admin"),
    Route(hdrs.METH_POST, "/v1/dead_letters/replay", dead_letters.replay_all, "admin"),
    Route(hdrs.METH_GET, "/v1/dead_letters/{job_id}", dead_letters.fetch, "admin"),
    Route(hdrs.METH_DELETE, "/v1/dead_letters/{job_id}", dead_letters.purge, "admin"),
    Route(hdrs.METH_POST, "/v1/dead_letters/{job_id}/replay", dead_letters.replay, "admin"),
    Route(hdrs.METH_GET, "/metrics", operations.metrics, "admin"),
    Route(hdrs.METH_GET, "/healthz", operations.healthz, PUBLIC),
    Route(hdrs.METH_GET, "/readyz", operations.readyz, PUBLIC),
    Route(hdrs.METH_GET, "/openapi.json", reference.document, PUBLIC),
    Route(hdrs.METH_GET, "/docs", reference.page, PUBLIC),
    Route(hdrs.METH_GET, "/docs/{asset}", reference.asset, PUBLIC),
    Route(hdrs.METH_GET, "/console", console.page, PUBLIC),
    Route(hdrs.METH_GET, "/console/{asset}", console.asset, PUBLIC),
)


def add_routes(
    router: web.UrlDispatcher, routes: tuple[Route, ...] = ROUTES
) -> Mapping[web.AbstractRoute, Route]:
    """Register the table; returns it by what a request's `match_info` names."""
    return {
        router.add_route(
            route.method, route.path, route.handler, expect_handler=route.expect
        ): route
        for route in routes
    }
