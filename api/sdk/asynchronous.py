"""The client for asyncio."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from api.sdk.objects import HourUsage, JobEvent, RemoteJob
from api.sdk.transport import Transport

#: One long poll; below what proxies usually cut.
_POLL_S = 30.0
#: Jobs of one page while iterating.
_PAGE = 100


class AsyncClient:
    """One tenant's access to one API. Use as an async context manager.

    Address and key default to `FOREBAY_URL` and `FOREBAY_API_KEY`.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        url = url or os.environ.get("FOREBAY_URL", "http://127.0.0.1:8080")
        key = key or os.environ.get("FOREBAY_API_KEY", "")
        self._transport = Transport(url, key, timeout_s=timeout_s, max_retries=max_retries)

    async def __aenter__(self) -> AsyncClient:
        await self._transport.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._transport.close()

    # -- jobs -------------------------------------------------------------------------------------
    async def submit(
        self,
        endpoint: str,
        body: Mapping[str, Any],
        *,
        priority: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **terms: Any,
    ) -> RemoteJob:
        """Put a job in the queue; `endpoint` is the OpenAI path that `body` belongs to.

        `terms` are `deadline`, `execution_timeout`, `delay`, `max_attempts`, `ttl`, `webhook`
        (docs/jobs.md). Without an `idempotency_key` the call gets one of its own, the same for all
        its repeats, so that a repeat finds the job. Raises `ApiError` (e.g. 400, 401, 429 after
        all repeats) or `ConnectionFailedError`.
        """
        request: dict[str, Any] = {"endpoint": endpoint, "body": dict(body), **terms}
        if priority is not None:
            request["priority"] = priority
        if metadata:
            request["metadata"] = dict(metadata)
        return RemoteJob.from_json(
            await self.post(
                "/v1/jobs", request, idempotency_key=idempotency_key or uuid.uuid4().hex
            )
        )

    async def get(self, job_id: str, *, wait_s: float = 0) -> RemoteJob:
        """The job now, or as soon as it is terminal within `wait_s` (long poll)."""
        query = {"wait": f"{wait_s:g}"} if wait_s > 0 else None
        return RemoteJob.from_json(
            await self._transport.call("GET", f"/v1/jobs/{job_id}", params=query)
        )

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> RemoteJob:
        """The job once it is terminal. Raises `TimeoutError`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{job_id} is not finished after {timeout_s:g} s")
            job = await self.get(job_id, wait_s=min(left, _POLL_S))
            if job.is_terminal:
                return job

    async def events(self, job_id: str, *, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """The job's events from the one after `after` to the last one, each once and in order.

        Goes on, on another connection and at whichever replica, after the last event seen when a
        connection breaks; raises `ConnectionFailedError` when the repeats are used up and not one
        event came between them.
        """
        path = f"/v1/jobs/{job_id}/events"
        async with aclosing(self._transport.events(path, after)) as stream:
            async for event in stream:
                yield event

    async def list_jobs(self, *, limit: int = 20, **filters: str | None) -> list[RemoteJob]:
        """One page; `filters` are `status`, `model`, `priority`, `created_after`, `after`,
        `order`."""
        page = await self.call("GET", "/v1/jobs", limit=str(limit), **filters)
        return [RemoteJob.from_json(raw) for raw in page["data"]]

    async def iter_jobs(self, **filters: str | None) -> AsyncGenerator[RemoteJob, None]:
        """All jobs that `filters` of `list_jobs` leave, the newest first unless `order` is `asc`;
        pages are fetched as they are needed."""
        while True:
            page = await self.call("GET", "/v1/jobs", limit=str(_PAGE), **filters)
            for raw in page["data"]:
                yield RemoteJob.from_json(raw)
            if not page["has_more"]:
                return
            filters["after"] = page["last_id"]

    async def cancel(self, job_id: str) -> RemoteJob:
        """Ask the job to stop; its status may still be `cancelling`."""
        return RemoteJob.from_json(
            await self._transport.call("POST", f"/v1/jobs/{job_id}/cancel", harmless=True)
        )

    async def cancel_many(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Cancel up to 1,000 jobs; `cancelled`, `cancelling`, `terminal` or `not_found` by id."""
        answer = await self._transport.call(
            "POST", "/v1/jobs/cancel", json={"ids": list(job_ids)}, harmless=True
        )
        return {entry["id"]: entry["result"] for entry in answer["data"]}

    async def retry(self, job_id: str) -> RemoteJob:
        """Put a failed or expired job in again."""
        return RemoteJob.from_json(await self._transport.call("POST", f"/v1/jobs/{job_id}/retry"))

    async def usage(
        self, *, hours: int = 24, model: str | None = None, tenant: str | None = None
    ) -> list[HourUsage]:
        """What jobs took that ended in the last `hours` (168 at most), by hour and model.

        Hours without an end are left out. Another tenant's needs a key with the scope `admin`.
        """
        page = await self.call("GET", "/v1/usage", hours=str(hours), model=model, tenant=tenant)
        return [HourUsage.from_json(raw) for raw in page["data"]]

    # -- OpenAI-compatible ------------------------------------------------------------------------
    async def chat(self, model: str, messages: Sequence[Mapping[str, str]], **body: Any) -> Any:
        """`POST /v1/chat/completions`, waiting for the answer; returns the response body."""
        return await self.post(
            "/v1/chat/completions", {"model": model, "messages": list(messages), **body}
        )

    async def embed(self, model: str, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text."""
        answer = await self.post("/v1/embeddings", {"model": model, "input": list(texts)})
        return [item["embedding"] for item in answer["data"]]

    async def moderate(self, texts: Sequence[str], **body: Any) -> list[Mapping[str, Any]]:
        """A verdict per text: `flagged`, `categories` and `category_scores`.

        `model` may be left out where there is one classifier only.
        """
        answer = await self.post("/v1/moderations", {"input": list(texts), **body})
        verdicts: list[Mapping[str, Any]] = answer["results"]
        return verdicts

    async def rerank(
        self, model: str, query: str, documents: Sequence[str], **body: Any
    ) -> list[Mapping[str, Any]]:
        """`index` and `relevance_score` of the documents, the best first."""
        asked = {"model": model, "query": query, "documents": list(documents), **body}
        ranked: list[Mapping[str, Any]] = (await self.post("/v1/rerank", asked))["results"]
        return ranked

    async def models(self) -> list[Mapping[str, Any]]:
        data: list[Mapping[str, Any]] = (await self.call("GET", "/v1/models"))["data"]
        return data

    async def post(
        self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Any:
        """Any other JSON call. With a key a repeat finds the first call's job, for 24 hours."""
        if idempotency_key is None:
            return await self._transport.call("POST", path, json=body)
        headers = {"Idempotency-Key": idempotency_key}
        return await self._transport.call("POST", path, json=body, headers=headers, harmless=True)

    async def call(self, method: str, path: str, **query: str | None) -> Any:
        """Any other call without a body."""
        params = {name: value for name, value in query.items() if value is not None}
        return await self._transport.call(method, path, params=params)
