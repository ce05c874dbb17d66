"""A tenant's webhook endpoints for the API: the database decides, Redis holds the worker's copy.

A change is published as soon as it is committed; what a crash in between left out is put right by
the look that every API process takes at start and each minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import redis.asyncio

from api.accounts.database import make_engine
from api.accounts.errors import AccountsError
from api.accounts.webhooks import StoredEndpoint, WebhookEndpointStore
from broker import keys
from broker.errors import BrokerError
from broker.webhooks import events, signing
from broker.webhooks.deliveries import Delivery, NewDelivery, State, job_log
from broker.webhooks.endpoints import TEST_EVENT, Health
from broker.webhooks.store import WebhookStore
from config.logs import get_logger
from config.settings import Settings

log = get_logger(__name__)

T = TypeVar("T")

#: What a crash left unpublished is published after this long.
_LOOK_S: Final = 60.0
_RETRY_S: Final = 1.0
#: How often a test's delivery is looked at.
_POLL_S: Final = 0.05
#: Stands for the webhooks of single jobs where an endpoint's id is expected.
JOBS: Final = "jobs"


class WebhookService:
    """Calls may raise `DatabaseUnavailableError` and `BrokerError`; for what a tenant doesn't have,
    `UnknownAccountError`."""

    def __init__(
        self, endpoints: WebhookEndpointStore, store: WebhookStore, settings: Settings
    ) -> None:
        """Raises `SettingsError` when there is nothing to derive secrets from."""
        self._endpoints = endpoints
        self._store = store
        self._settings = settings.webhooks
        self._key = signing.installation_key(settings)
        # Of its own: a slow database holds up nothing else.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="webhooks")

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    # -- endpoints --------------------------------------------------------------------------------
    async def create(self, tenant: str, **fields: Any) -> tuple[StoredEndpoint, str]:
        """The endpoint and its secret. Raises `TooManyEndpointsError`."""
        most = self._settings.max_endpoints
        made = await self._call(lambda: self._endpoints.add(tenant, most=most, **fields))
        await self._publish(tenant)
        return made, self._secret(made)

    async def change(
        self, tenant: str, endpoint_id: str, **fields: Any
    ) -> tuple[StoredEndpoint, Health]:
        """Enabling it also forgets why it was disabled."""
        changed = await self._call(lambda: self._endpoints.change(tenant, endpoint_id, **fields))
        if fields.get("enabled"):
            await self._store.enable(endpoint_id)
        await self._publish(tenant)
        return changed, (await self._store.health([endpoint_id]))[0]

    async def rotate(
        self, tenant: str, endpoint_id: str, *, overlap_s: float
    ) -> tuple[StoredEndpoint, str]:
        changed = await self._call(
            lambda: self._endpoints.rotate(tenant, endpoint_id, overlap_s=overlap_s)
        )
        await self._publish(tenant)
        return changed, self._secret(changed)

    async def rotate_jobs(self, tenant: str, *, overlap_s: float) -> str:
        """A new secret for the webhooks of single jobs."""
        made = await self._call(lambda: self._endpoints.rotate_jobs(tenant, overlap_s=overlap_s))
        await self._publish(tenant)
        return signing.shown(signing.secret(self._key, signing.job_signer(tenant), made.version))

    async def delete(self, tenant: str, endpoint_id: str) -> None:
        await self._call(lambda: self._endpoints.delete(tenant, endpoint_id))
        await self._publish(tenant)
        await self._store.forget(endpoint_id)

    async def get(self, tenant: str, endpoint_id: str) -> tuple[StoredEndpoint, Health]:
        found = await self._call(lambda: self._endpoints.get(tenant, endpoint_id))
        return found, (await self._store.health([endpoint_id]))[0]

    async def list_all(self, tenant: str) -> list[tuple[StoredEndpoint, Health]]:
        """Newest first."""
        found = await self._call(lambda: self._endpoints.list_all(tenant))
        return list(zip(found, await self._store.health([each.id for each in found]), strict=True))

    def _secret(self, stored: StoredEndpoint) -> str:
        version = stored.endpoint.signing.version
        return signing.shown(signing.secret(self._key, stored.id, version))

    # -- deliveries -------------------------------------------------------------------------------
    async def test(
        self, tenant: str, endpoint_id: str, event_type: str = TEST_EVENT
    ) -> Delivery | None:
        """Send a test message, or a sample of an event, and wait for its first attempt.

        None when that takes too long.
        """
        found, _ = await self.get(tenant, endpoint_id)
        now_ms = time.time_ns() // 1_000_000
        event_id = f"evt_{endpoint_id.removeprefix('wep_')}_test_{time.time_ns():x}"
        data = events.sample_data(event_type, endpoint_id)
        delivery = NewDelivery(
            tenant=tenant,
            url=found.endpoint.url,
            event_id=event_id,
            event_type=event_type,
            body=events.message(event_id, event_type, now_ms, data),
            endpoint=endpoint_id,
        )
        await self._store.put([], [delivery])
        deadline = time.monotonic() + self._settings.timeout_s + 2
        while time.monotonic() < deadline:
            seen = await self._store.delivery(delivery.id, tenant)
            if seen is None or seen.tries or seen.state != "pending":
                return seen
            await asyncio.sleep(_POLL_S)
        return None

    async def deliveries(
        self, tenant: str, endpoint_id: str, *, after: str, limit: int, state: State | None
    ) -> tuple[list[Delivery], bool]:
        """A page of an endpoint's log, newest first, and whether more follow."""
        if endpoint_id == JOBS:
            log_name = job_log(tenant)
        else:
            await self._call(lambda: self._endpoints.get(tenant, endpoint_id))
            log_name = endpoint_id
        states = (state,) if state else ()
        return await self._store.deliveries(log_name, after=after, limit=limit, states=states)

    async def redeliver(self, tenant: str, delivery_id: str) -> Delivery | None:
        """Send it again with its own id; None when there is no such delivery."""
        if not await self._store.again(delivery_id, tenant):
            return None
        return await self._store.delivery(delivery_id, tenant)

    # -- the copy in Redis ------------------------------------------------------------------------
    async def _publish(self, tenant: str | None = None) -> int:
        """Bring the copy of one tenant, or of all, to what the database has; changes made."""
        seen_signings = await self._store.job_signings()
        tenants = [tenant] if tenant is not None else await self._store.tenants()
        seen = {each: await self._store.endpoints(each) for each in tenants}
        # Read after Redis: whatever Redis has by now is in the database.
        wanted = await self._call(lambda: self._endpoints.published(tenant))
        changed = 0
        for each in {*seen, *wanted.endpoints}:
            old = seen[each] if each in seen else await self._store.endpoints(each)
            key = keys.webhook_endpoints(each)
            changed += await self._bring(key, old, wanted.endpoints.get(each, {}), tenant=each)
        if tenant is not None:
            seen_signings = {name: raw for name, raw in seen_signings.items() if name == tenant}
        changed += await self._bring(keys.WEBHOOK_JOB_SECRETS, seen_signings, wanted.signings)
        return changed

    async def _bring(
        self,
        key: str,
        seen: Mapping[str, bytes],
        wanted: Mapping[str, bytes],
        *,
        tenant: str = "",
    ) -> int:
        changed = 0
        for name in seen.keys() | wanted.keys():
            old, new = seen.get(name, b""), wanted.get(name, b"")
            if old != new:
                changed += await self._store.mirror(key, name, old, new, tenant=tenant)
        return changed

    async def keep_published(self) -> None:
        """Until cancelled: look at once, then each minute."""
        failing = False
        while True:
            try:
                if changed := await self._publish():
                    log.info("webhook_endpoints_published", count=changed)
                failing = False
            except (AccountsError, BrokerError) as error:
                if not failing:
                    log.warning("webhook_endpoints_not_published", why=type(error).__name__)
                failing = True
            await asyncio.sleep(_RETRY_S if failing else _LOOK_S)

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


@contextlib.asynccontextmanager
async def open_webhooks(
    settings: Settings, *, client: redis.asyncio.Redis
) -> AsyncIterator[WebhookService]:
    """A service that keeps the copy right while the context lasts, on an engine of its own."""
    engine = make_engine(settings.database)
    service = WebhookService(
        WebhookEndpointStore(engine), WebhookStore(client, settings.webhooks), settings
    )
    keeping = asyncio.create_task(service.keep_published())
    try:
        yield service
    finally:
        await _ended(keeping)
        service.close()
        engine.dispose()


async def _ended(task: asyncio.Task[None]) -> None:
    # Again and again: redis-py uses `asyncio.wait_for`, which in Python 3.11 can swallow a cancel.
    pending: set[Awaitable[None]] = {task}
    while pending:
        task.cancel()
        _, left = await asyncio.wait([task], timeout=0.1)
        pending = set(left)
