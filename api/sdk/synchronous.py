"""The client without asyncio: the same calls, each waiting for its end.

It is the asynchronous one on an event loop in a thread of its own, so that both repeat, resume and
fail alike. One may be shared by threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from api.sdk.asynchronous import AsyncClient
from api.sdk.objects import HourUsage, JobEvent, RemoteJob

T = TypeVar("T")


class Client:
    """One tenant's access to one API. Use as a context manager.

    Address and key default to `FOREBAY_URL` and `FOREBAY_API_KEY`. What the calls take, return and
    raise is described at `AsyncClient`.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        self._inner = AsyncClient(url, key, timeout_s=timeout_s, max_retries=max_retries)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Client:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="forebay-client", daemon=True
        )
        self._thread.start()
        self._run(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loop = self._loop
        if loop is None:
            return
        self._run(self._inner.__aexit__(kind, error, trace))
        self._run(loop.shutdown_asyncgens())
        self._loop = None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("use the client as a context manager")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C ends the call as well, not only the wait for it.
            future.cancel()
            raise

    def _each(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> tuple[T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self._run(following())) is not None:
                yield item[0]
        finally:
            if self._loop is not None:
                self._run(items.aclose())

    # -- jobs -------------------------------------------------------------------------------------
    def submit(
        self,
        endpoint: str,
        body: Mapping[str, Any],
        *,
        priority: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **terms: Any,
    ) -> RemoteJob:
        return self._run(
            self._inner.submit(
                endpoint,
                body,
                priority=priority,
                metadata=metadata,
                idempotency_key=idempotency_key,
                **terms,
            )
        )

    def get(self, job_id: str, *, wait_s: float = 0) -> RemoteJob:
        return self._run(self._inner.get(job_id, wait_s=wait_s))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> RemoteJob:
        return self._run(self._inner.wait(job_id, timeout_s=timeout_s))

    def events(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        return self._each(self._inner.events(job_id, after=after))

    def list_jobs(self, *, limit: int = 20, **filters: str | None) -> list[RemoteJob]:
        return self._run(self._inner.list_jobs(limit=limit, **filters))

    def iter_jobs(self, **filters: str | None) -> Iterator[RemoteJob]:
        return self._each(self._inner.iter_jobs(**filters))

    def cancel(self, job_id: str) -> RemoteJob:
        return self._run(self._inner.cancel(job_id))

    def cancel_many(self, job_ids: Sequence[str]) -> dict[str, str]:
        return self._run(self._inner.cancel_many(job_ids))

    def retry(self, job_id: str) -> RemoteJob:
        return self._run(self._inner.retry(job_id))

    def usage(
        self, *, hours: int = 24, model: str | None = None, tenant: str | None = None
    ) -> list[HourUsage]:
        return self._run(self._inner.usage(hours=hours, model=model, tenant=tenant))

    # -- OpenAI-compatible ------------------------------------------------------------------------
    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **body: Any) -> Any:
        return self._run(self._inner.chat(model, messages, **body))

    def embed(self, model: str, texts: Sequence[str]) -> list[list[float]]:
        return self._run(self._inner.embed(model, texts))

    def moderate(self, texts: Sequence[str], **body: Any) -> list[Mapping[str, Any]]:
        return self._run(self._inner.moderate(texts, **body))

    def rerank(
        self, model: str, query: str, documents: Sequence[str], **body: Any
    ) -> list[Mapping[str, Any]]:
        return self._run(self._inner.rerank(model, query, documents, **body))

    def models(self) -> list[Mapping[str, Any]]:
        return self._run(self._inner.models())

    def post(
        self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Any:
        return self._run(self._inner.post(path, body, idempotency_key=idempotency_key))

    def call(self, method: str, path: str, **query: str | None) -> Any:
        return self._run(self._inner.call(method, path, **query))
