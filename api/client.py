"""The Python client of the jobs API: `AsyncClient` for asyncio, `Client` without it.

    with Client("http://127.0.0.1:8080", "fb_live_…") as client:
        job = client.submit("/v1/completions", {"model": "smollm2-135m", "prompt": "Hi"})
        print(client.wait(job.id).output)

Calls that were refused for now (429, 503) or reached nobody are repeated, honouring `Retry-After`;
when only the answer is missing, those that do no harm twice. A submit is one of them: it carries an
`Idempotency-Key`, the same for all its repeats, so that a repeat finds the job. Other posts are
when the caller gives a key. An event stream that breaks is resumed after the last event seen. For
the OpenAI-compatible paths the `openai` package works as well. More: docs/sdk.md.
"""

from __future__ import annotations

from api.sdk.asynchronous import AsyncClient
from api.sdk.errors import ApiError, ClientError, ConnectionFailedError, WebhookError
from api.sdk.objects import TERMINAL, HourUsage, JobEvent, RemoteJob
from api.sdk.synchronous import Client
from api.sdk.webhooks import verify_webhook

__all__ = [
    "TERMINAL",
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "ConnectionFailedError",
    "HourUsage",
    "JobEvent",
    "RemoteJob",
    "WebhookError",
    "verify_webhook",
]
