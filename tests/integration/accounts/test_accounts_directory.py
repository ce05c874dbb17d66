"""The directory of an API process: what it knows, and how soon it knows better."""

from __future__ import annotations

import asyncio
import math
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
import redis.asyncio
import structlog
from pydantic import SecretStr
from sqlalchemy import Engine, text

from api.accounts import schema
from api.accounts.database import make_engine, writing
from api.accounts.directory import Directory, open_directory
from api.accounts.errors import DatabaseUnavailableError
from api.accounts.policies import PolicyMirror
from api.accounts.service import AccountsService
from api.accounts.store import AccountStore, Loaded
from api.auth import keys
from api.auth.authenticator import Authenticator
from api.auth.errors import AuthenticationError, AuthenticationUnavailableError, Reason
from broker.connections import connect_async
from broker.keys import ACCOUNTS_CHANNEL, POLICY_WEIGHT
from broker.policies import TenantPolicy
from config.settings import Database, Redis, Settings
from tests.conftest import PATIENCE_S, free_port

Until = Callable[..., Awaitable[float]]

#: The poll never comes within a test: what is seen is seen through a notice.
NEVER_S = 3600.0


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    made = connect_async(settings.redis)
    yield made
    await made.aclose()


def refusal(directory: Directory, settings: Settings, key: str) -> Reason | None:
    """None while the key is accepted."""
    try:
        Authenticator(directory, settings.auth).authenticate(f"Bearer {key}")
    except AuthenticationError as error:
        return error.reason
    return None


async def subscribed(client: redis.asyncio.Redis, until: Until) -> None:
    """Wait until somebody listens for notices."""
    known = client.connection_pool.connection_kwargs
    with redis.Redis(host=known["host"], port=known["port"]) as other:
        await until(lambda: other.pubsub_numsub(ACCOUNTS_CHANNEL)[0][1] == 1)


async def test_a_key_authenticates_as_its_tenant(
    settings: Settings, service: AccountsService, client: redis.asyncio.Redis
) -> None:
    tenant = service.create_tenant("acme", weight=3)
    new = service.create_key("acme", scopes=["admin"])
    async with open_directory(settings, client=client) as directory:
        assert directory.ready
        assert directory.age_s < PATIENCE_S
        principal = Authenticator.from_settings(settings, directory).authenticate(
            f"Bearer {new.secret}"
        )
    assert (principal.tenant, principal.tenant_name) == (tenant.id, "acme")
    assert principal.key_id == new.key.id
    assert principal.scopes == {"admin"}
    assert principal.policy == tenant.policy


async def test_revocation_is_seen_in_time_with_and_without_its_notice(
    settings: Settings,
    service: AccountsService,
    store: AccountStore,
    client: redis.asyncio.Redis,
    until: Until,
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme")
    nowhere = connect_async(Redis(url=SecretStr("redis://127.0.0.1:1/0")))
    noticed = Directory(store, client=client, refresh_s=NEVER_S)
    deaf = Directory(store, client=nowhere, refresh_s=settings.auth.refresh_s)
    try:
        await asyncio.gather(noticed.start(), deaf.start())
        await subscribed(client, until)
        assert refusal(noticed, settings, new.secret) is None
        assert refusal(deaf, settings, new.secret) is None
        await asyncio.to_thread(service.revoke_key, new.key.id)
        await until(lambda: refusal(noticed, settings, new.secret) is Reason.UNKNOWN_KEY)
        # Within 5 s of the revocation, as is promised.
        assert settings.auth.refresh_s < 5
        await until(lambda: refusal(deaf, settings, new.secret) is Reason.UNKNOWN_KEY)
    finally:
        await asyncio.gather(noticed.stop(), deaf.stop())
        await nowhere.aclose()


async def test_each_kind_of_change_is_seen(
    settings: Settings, service: AccountsService, client: redis.asyncio.Redis, until: Until
) -> None:
    async with open_directory(settings, client=client) as directory:
        await subscribed(client, until)
        tenant = await asyncio.to_thread(service.create_tenant, "acme")
        await until(lambda: directory.account(tenant.id) is not None)
        new = await asyncio.to_thread(service.create_key, "acme")
        await until(lambda: refusal(directory, settings, new.secret) is None)
        await asyncio.to_thread(lambda: service.set_tenant("acme", weight=9))

        def weight() -> float:
            header = f"Bearer {new.secret}"
            return Authenticator(directory, settings.auth).authenticate(header).policy.weight

        await until(lambda: weight() == 9)
        await asyncio.to_thread(lambda: service.set_tenant("acme", disabled=True))
        await until(lambda: refusal(directory, settings, new.secret) is Reason.UNKNOWN_KEY)
        assert directory.account(tenant.id) is None
        await asyncio.to_thread(lambda: service.set_tenant("acme", disabled=False))
        await until(lambda: refusal(directory, settings, new.secret) is None)


async def test_a_loaded_key_expires_by_the_clock(
    settings: Settings, service: AccountsService, store: AccountStore
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme", expires_in=timedelta(hours=1))
    directory = Directory(store, client=None, refresh_s=NEVER_S)
    await directory.start()
    try:
        later = time.time() + 3601
        assert refusal(directory, settings, new.secret) is None
        with pytest.raises(AuthenticationError) as caught:
            Authenticator(directory, settings.auth, clock=lambda: later).authenticate(
                f"Bearer {new.secret}"
            )
        assert caught.value.reason is Reason.EXPIRED_KEY
    finally:
        await directory.stop()


def test_expired_keys_are_not_loaded(service: AccountsService, store: AccountStore) -> None:
    service.create_tenant("acme")
    service.create_key("acme", expires_in=timedelta(hours=1))
    assert len(store.load(now=datetime.now(UTC)).keys) == 1
    assert store.load(now=datetime.now(UTC) + timedelta(hours=2)).keys == ()


async def test_last_use_is_written_in_the_end(
    settings: Settings, service: AccountsService, client: redis.asyncio.Redis
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme")
    async with open_directory(settings, client=client) as directory:
        assert refusal(directory, settings, new.secret) is None
        assert service.list_keys()[0].last_used_at is None
    used = service.list_keys()[0].last_used_at
    assert used is not None
    assert datetime.now(UTC) - used < timedelta(minutes=1)


# -- the database is away -------------------------------------------------------------------------
async def test_without_a_schema_it_is_not_ready_until_there_is_one(
    settings: Settings, empty_engine: Engine, until: Until
) -> None:
    directory = Directory(AccountStore(empty_engine), client=None, refresh_s=0.02)
    with structlog.testing.capture_logs() as lines:
        await directory.start()
        try:
            assert not directory.ready
            assert directory.age_s == math.inf
            with pytest.raises(AuthenticationUnavailableError):
                refusal(directory, settings, keys.generate("test").text)
            await asyncio.to_thread(schema.upgrade, empty_engine)
            await until(lambda: directory.ready)
        finally:
            await directory.stop()
    assert [line["event"] for line in lines if line["log_level"] == "error"] == [
        "accounts_unreachable"
    ]


async def test_the_last_snapshot_serves_while_postgresql_is_away(
    settings: Settings,
    postgresql_url: str,
    admin_sql: Callable[[str], None],
    until: Until,
) -> None:
    name = postgresql_url.rsplit("/", 1)[1]
    local = settings.model_copy(update={"database": Database(url=SecretStr(postgresql_url))})
    engine = make_engine(local.database)
    schema.upgrade(engine)
    directory = Directory(AccountStore(engine), client=None, refresh_s=0.05)
    with AccountsService.from_settings(local) as service:
        service.create_tenant("acme")
        new = service.create_key("acme")
        with structlog.testing.capture_logs() as lines:
            await directory.start()
            try:
                admin_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
                admin_sql(
                    f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='{name}'"
                )
                await until(lambda: directory.age_s > 0.5)
                assert directory.ready
                assert refusal(directory, settings, new.secret) is None
                admin_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
                await until(lambda: directory.age_s < 0.2)
                await asyncio.to_thread(service.revoke_key, new.key.id)
                await until(lambda: refusal(directory, settings, new.secret) is not None)
            finally:
                await directory.stop()
    engine.dispose()
    events = [line["event"] for line in lines]
    assert events.count("accounts_unreachable") == 1
    assert events.count("accounts_reachable") == 1


async def test_the_request_path_never_waits_for_a_slow_database(
    settings: Settings, service: AccountsService, engine: Engine, until: Until
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme")
    slow = _SlowStore(engine)
    directory = Directory(slow, client=None, refresh_s=0.01)
    slow.go_on.set()
    await directory.start()
    try:
        slow.go_on.clear()
        await until(slow.waiting.is_set)
        began = time.perf_counter()
        for _ in range(100):
            assert refusal(directory, settings, new.secret) is None
        assert time.perf_counter() - began < 10  # the database would answer after 30
        assert slow.waiting.is_set()
    finally:
        slow.go_on.set()
        await directory.stop()


class _SlowStore(AccountStore):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.go_on = threading.Event()
        self.waiting = threading.Event()

    def counter(self) -> int:
        if not self.go_on.is_set():
            self.waiting.set()
            assert self.go_on.wait(30)
        return super().counter()


async def test_uses_that_could_not_be_written_are_written_later(
    settings: Settings, service: AccountsService, engine: Engine
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme")
    directory = Directory(_ReadOnlyOnce(engine), client=None, refresh_s=NEVER_S)
    await directory.start()
    assert refusal(directory, settings, new.secret) is None
    with pytest.raises(DatabaseUnavailableError):
        await directory._write_uses()
    await directory.stop()
    assert service.list_keys()[0].last_used_at is not None


class _ReadOnlyOnce(AccountStore):
    failed = False

    def note_use(self, last_used: object, *, older_than: datetime) -> None:
        if not self.failed:
            self.failed = True
            raise DatabaseUnavailableError("read-only")
        super().note_use(last_used, older_than=older_than)  # type: ignore[arg-type]


async def test_a_change_during_the_load_is_not_lost(
    settings: Settings, service: AccountsService, engine: Engine, until: Until
) -> None:
    """A key is revoked after its row was read but before the snapshot is in place."""
    service.create_tenant("acme")
    new = service.create_key("acme")

    class Interrupted(AccountStore):
        def load(self, *, now: datetime) -> Loaded:
            loaded = super().load(now=now)
            service.revoke_key(new.key.id)
            return loaded

    directory = Directory(Interrupted(engine), client=None, refresh_s=0.02)
    await directory.start()
    try:
        await until(lambda: refusal(directory, settings, new.secret) is Reason.UNKNOWN_KEY)
    finally:
        await directory.stop()


# -- Redis is away --------------------------------------------------------------------------------
class Server:
    """A Valkey on a port of its own that can be stopped and started again."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [binary, "--port", str(self.port), "--save", "", "--dir", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                else:
                    return

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


@pytest.fixture
def server(valkey_binary: str, tmp_path: Path) -> Iterator[Server]:
    made = Server(valkey_binary, tmp_path)
    made.start()
    yield made
    made.stop()


async def test_notices_and_policies_survive_a_restart_of_redis(
    settings: Settings, engine: Engine, server: Server, until: Until
) -> None:
    """It comes back empty: the subscription is renewed and the policies are published again."""
    local = settings.model_copy(update={"redis": Redis(url=SecretStr(server.url))})
    client = connect_async(local.redis)
    published: list[str] = []

    async def set_policy(tenant: str, policy: TenantPolicy) -> None:
        await client.hset(POLICY_WEIGHT, tenant, policy.weight)
        published.append(tenant)

    mirror = PolicyMirror(client, set_policy)
    directory = Directory(AccountStore(engine), client=client, refresh_s=NEVER_S, policies=mirror)
    with AccountsService.from_settings(local) as service:
        tenant = service.create_tenant("acme")
        new = service.create_key("acme")
        await directory.start()
        try:
            await subscribed(client, until)
            await until(lambda: directory.ready)
            await asyncio.to_thread(server.stop)
            assert refusal(directory, settings, new.secret) is None
            # Said while nobody could hear it: the renewed subscription makes up for it.
            service.create_tenant("unheard")
            await asyncio.to_thread(server.start)
            await subscribed(client, until)
            await until(lambda: tenant.id in published)
            await until(lambda: len(directory._snapshot.by_tenant) == 2)
            await asyncio.to_thread(service.revoke_key, new.key.id)
            await until(lambda: refusal(directory, settings, new.secret) is not None)
        finally:
            await directory.stop()
            await client.aclose()


async def test_only_policies_that_differ_are_published(
    settings: Settings, service: AccountsService, client: redis.asyncio.Redis, store: AccountStore
) -> None:
    told: list[str] = []

    async def set_policy(tenant: str, policy: TenantPolicy) -> None:
        told.append(tenant)

    right, wrong, lost = (service.create_tenant(name) for name in ("right", "wrong", "lost"))
    await client.hset(POLICY_WEIGHT, wrong.id, "77")
    await client.hdel(POLICY_WEIGHT, lost.id)
    directory = Directory(store, client=None, refresh_s=NEVER_S)
    await directory.start()
    await directory.stop()
    accounts = [directory.account(tenant.id) for tenant in (right, wrong, lost)]
    mirror = PolicyMirror(client, set_policy)
    assert await mirror.bring([account for account in accounts if account]) == 2
    assert told == [wrong.id, lost.id]


async def test_a_lost_counter_is_said_and_does_not_stop_the_service(
    settings: Settings, service: AccountsService, store: AccountStore, engine: Engine, until: Until
) -> None:
    service.create_tenant("acme")
    new = service.create_key("acme")
    directory = Directory(store, client=None, refresh_s=0.02)
    with structlog.testing.capture_logs() as lines:
        await directory.start()
        with writing(engine) as connection:
            connection.execute(text("DELETE FROM account_changes"))
        await until(lambda: any(line["event"] == "accounts_unreachable" for line in lines))
        assert refusal(directory, settings, new.secret) is None
        await directory.stop()
