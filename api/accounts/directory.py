"""All live tenants and keys in the memory of one API process, kept fresh from the database.

A request is authenticated from here and never waits for SQL. A change is seen at once through its
notice in Redis, and within `auth.refresh_s` through the change counter when the notice was lost.
While the database is away the last snapshot goes on serving: nobody can change an account then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import redis.asyncio

from api.accounts.database import make_engine
from api.accounts.errors import AccountsError
from api.accounts.policies import PolicyMirror
from api.accounts.store import AccountStore, Loaded
from api.auth.principal import Account, Credential, Principal
from broker.keys import ACCOUNTS_CHANNEL
from broker.policies import TenantPolicy
from config.logs import get_logger
from config.settings import Settings

log = get_logger(__name__)

T = TypeVar("T")

#: Least time between two writes of a key's `last_used_at`.
_USE_INTERVAL_S: Final = 60.0
#: Redis is asked again after this long, doubled up to the second value.
_RETRY_S: Final = (0.1, 2.0)
#: A subscription waits this long for a notice before it looks whether its connection still lives.
_LISTEN_S: Final = 1.0
#: A task that goes on after a cancel is cancelled again.
_CANCEL_S: Final = 0.1
#: Longest a stop waits for the database.
_STOP_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Replaced as a whole, so that a reader never sees half a change."""

    counter: int = -1
    by_digest: dict[bytes, Credential] = field(default_factory=dict)
    by_tenant: dict[str, Account] = field(default_factory=dict)


class Directory:
    """Keeps the contract `api.auth.principal.Accounts`. One per API process."""

    def __init__(
        self,
        store: AccountStore,
        *,
        client: redis.asyncio.Redis | None,
        refresh_s: float,
        policies: PolicyMirror | None = None,
    ) -> None:
        """Without `client` changes are seen through the counter alone; it stays the caller's to
        close."""
        self._store = store
        self._redis = client
        self._refresh_s = refresh_s
        self._policies = policies
        self._snapshot = _Snapshot()
        self._checked = -math.inf
        self._failing = False
        self._schema_checked = False
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # A thread of its own: a slow database holds up nothing but the next look at it.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="accounts")
        self._last_use: dict[str, float] = {}
        self._uses_written = time.monotonic()

    # -- read by the authenticator ----------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """Whether accounts were loaded at least once."""
        return self._snapshot.counter >= 0

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was last known to be current; infinite before the first."""
        return time.monotonic() - self._checked

    def credential(self, digest: bytes) -> Credential | None:
        return self._snapshot.by_digest.get(digest)

    def account(self, tenant_id: str) -> Account | None:
        return self._snapshot.by_tenant.get(tenant_id)

    def used(self, key_id: str) -> None:
        self._last_use[key_id] = time.time()

    # -- life -------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Load once and keep fresh from then on.

        A database that can't be used is logged and tried again, with `ready` False until then.
        """
        await self._refresh()
        self._tasks = [asyncio.create_task(self._keep_fresh())]
        if self._redis is not None:
            self._tasks.append(asyncio.create_task(self._listen(self._redis)))
        if self._policies is not None:
            follow = self._policies.run(lambda: self._snapshot.by_tenant.values())
            self._tasks.append(asyncio.create_task(follow))

    async def stop(self) -> None:
        """Stop following changes and write down the last uses."""
        pending = set(self._tasks)
        while pending:
            # Again and again: `wait_for` of Python 3.11, which redis-py sends through, loses a
            # cancel that comes together with its result.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_CANCEL_S)
        self._tasks = []
        with contextlib.suppress(AccountsError, TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await self._write_uses()
        self._thread.shutdown(wait=False)

    # -- following --------------------------------------------------------------------------------
    async def _keep_fresh(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s):
                    await self._wake.wait()
            # Cleared before the look: a notice that comes during it asks for another one.
            self._wake.clear()
            await self._refresh()
            if time.monotonic() - self._uses_written >= _USE_INTERVAL_S:
                with contextlib.suppress(AccountsError):
                    await self._write_uses()

    async def _refresh(self) -> None:
        """Load when the counter has moved; a failure keeps what is there."""
        asked = time.monotonic()
        try:
            loaded = await self._in_thread(self._load_if_changed)
        except AccountsError as error:
            if not self._failing:
                log.error("accounts_unreachable", why=str(error), serving=self.ready)
            self._failing = True
            return
        except Exception:
            # Not thought of, so it has to be seen; the process goes on with what it knows.
            if not self._failing:
                log.exception("accounts_refresh_failed", serving=self.ready)
            self._failing = True
            return
        if self._failing:
            log.info("accounts_reachable")
            self._failing = False
        self._checked = asked
        if loaded is not None:
            self._snapshot = loaded
            log.info(
                "accounts_loaded",
                counter=loaded.counter,
                tenants=len(loaded.by_tenant),
                keys=len(loaded.by_digest),
            )
            if self._policies is not None:
                self._policies.look()

    def _load_if_changed(self) -> _Snapshot | None:
        if not self._schema_checked:
            self._store.check_schema()
            self._schema_checked = True
        if self._store.counter() == self._snapshot.counter:
            return None
        return _snapshot(self._store.load(now=datetime.now(UTC)))

    async def _listen(self, client: redis.asyncio.Redis) -> None:
        """Wake the refresh at every notice, and whenever one may have been missed."""
        delay_s, longest_s = _RETRY_S
        lost = False
        while True:
            try:
                async with client.pubsub() as subscription:
                    await subscription.subscribe(ACCOUNTS_CHANNEL)
                    while True:
                        message = await subscription.get_message(timeout=_LISTEN_S)
                        # The confirmation of a subscription counts too: what was said before it
                        # went unheard, and Redis may have come back empty.
                        if message is not None:
                            delay_s = _RETRY_S[0]
                            if lost:
                                lost = False
                                log.info("accounts_notices_found")
                            if message["type"] == "subscribe" and self._policies is not None:
                                self._policies.look()
                            self._wake.set()
            except (redis.RedisError, OSError) as error:
                if not lost:
                    lost = True
                    log.warning("accounts_notices_lost", why=type(error).__name__)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, longest_s)

    async def _write_uses(self) -> None:
        """Write what was used since the last time; put back what couldn't be written."""
        uses, self._last_use = self._last_use, {}
        self._uses_written = time.monotonic()
        if not uses:
            return
        stamps = {key_id: datetime.fromtimestamp(at, UTC) for key_id, at in uses.items()}
        older_than = datetime.now(UTC) - timedelta(seconds=_USE_INTERVAL_S)
        try:
            await self._in_thread(lambda: self._store.note_use(stamps, older_than=older_than))
        except AccountsError:
            self._last_use = uses | self._last_use
            raise

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


@contextlib.asynccontextmanager
async def open_directory(
    settings: Settings,
    *,
    client: redis.asyncio.Redis,
    set_policy: Callable[[str, TenantPolicy], Awaitable[None]] | None = None,
) -> AsyncIterator[Directory]:
    """A directory that runs while the context lasts, on an engine of its own.

    With `set_policy` (that of the queue) it also keeps the policies in Redis right.
    """
    engine = make_engine(settings.database)
    directory = Directory(
        AccountStore(engine),
        client=client,
        refresh_s=settings.auth.refresh_s,
        policies=PolicyMirror(client, set_policy) if set_policy is not None else None,
    )
    try:
        await directory.start()
        yield directory
    finally:
        await directory.stop()
        engine.dispose()


def _snapshot(loaded: Loaded) -> _Snapshot:
    tenants = {
        tenant.id: Account(id=tenant.id, name=tenant.name, policy=tenant.policy)
        for tenant in loaded.tenants
    }
    keys = {
        key.digest: Credential(
            principal=Principal(
                tenant=tenant.id,
                tenant_name=tenant.name,
                key_id=key.id,
                scopes=key.scopes,
                policy=tenant.policy,
                key_limits=key.limits,
            ),
            expires_at=math.inf if key.expires_at is None else key.expires_at.timestamp(),
        )
        for key in loaded.keys
        if (tenant := tenants.get(key.tenant_id)) is not None
    }
    return _Snapshot(loaded.counter, keys, tenants)
