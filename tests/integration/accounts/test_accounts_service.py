"""Tenants and keys on real databases, and what the broker is told of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import structlog
from pydantic import SecretStr
from sqlalchemy import Engine, text

from api.accounts.database import reading
from api.accounts.errors import InvalidAccountError, NameTakenError, UnknownAccountError
from api.accounts.service import AccountsService
from api.accounts.store import AccountStore
from api.auth import keys
from broker.errors import BrokerError
from broker.jobs import Band
from broker.keys import ACCOUNTS_CHANNEL, POLICY_CAP, POLICY_MAX_QUEUED, POLICY_WEIGHT
from broker.limits import RateLimits
from broker.policies import TenantPolicy
from config.settings import Auth, Redis, Settings, SettingsError
from tests.conftest import PATIENCE_S


@pytest.fixture
def broker(valkey: str) -> Any:
    with redis.Redis.from_url(valkey) as client:
        yield client


# -- tenants ----------------------------------------------------------------------------------
def test_a_tenant_is_kept_as_it_was_made(service: AccountsService) -> None:
    made = service.create_tenant(
        "acme",
        weight=2.5,
        max_in_flight=3,
        max_queued=40,
        default_band=Band.BATCH,
        allow_logprobs=True,
    )
    assert made.id.startswith("ten_")
    assert service.list_tenants() == [made]
    assert service.get_tenant("acme") == service.get_tenant(made.id) == made
    assert made.policy == TenantPolicy(
        weight=2.5,
        max_in_flight=3,
        max_queued=40,
        default_band=Band.BATCH,
        allow_logprobs=True,
    )
    assert not service.set_tenant("acme", allow_logprobs=False).policy.allow_logprobs
    assert abs(made.created_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_what_is_not_given_comes_from_the_settings(
    engine: Engine, settings: Settings, service: AccountsService
) -> None:
    made = service.create_tenant("acme")
    assert made.policy.weight == settings.queue.default_weight
    assert made.policy.max_in_flight == settings.queue.default_max_in_flight
    assert made.policy.max_queued == settings.queue.default_max_queued


def test_limits_are_set_and_taken_away(service: AccountsService) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": 9000, "max_jobs": 5}
    made = service.create_tenant("acme", **limits)
    assert made.policy.limits == RateLimits(**limits)
    assert service.set_tenant("acme", tokens_per_minute=0).policy.limits == RateLimits(
        requests_per_minute=60, max_jobs=5
    )
    key = service.create_key("acme", requests_per_minute=6, tokens_per_minute=90).key
    assert key.limits == RateLimits(requests_per_minute=6, tokens_per_minute=90)
    assert service.list_keys() == [key]
    changed = service.set_key(key.id, max_jobs=4, tokens_per_minute=0)
    assert changed.limits == RateLimits(requests_per_minute=6, max_jobs=4)
    assert service.list_keys() == [changed]
    with pytest.raises(InvalidAccountError):
        service.create_key("acme", requests_per_minute=-1)
    with pytest.raises(InvalidAccountError):
        service.set_key(key.id, max_jobs=-1)
    with pytest.raises(UnknownAccountError):
        service.set_key("key_x", max_jobs=1)


def test_set_changes_what_is_given_and_nothing_else(service: AccountsService) -> None:
    made = service.create_tenant("acme", weight=2, max_in_flight=3)
    changed = service.set_tenant("acme", weight=4)
    assert (changed.policy.weight, changed.policy.max_in_flight) == (4, 3)
    assert (changed.id, changed.created_at) == (made.id, made.created_at)
    assert changed.updated_at > made.updated_at
    assert service.list_tenants() == [changed]


def test_disabling_is_remembered_and_undone(service: AccountsService) -> None:
    service.create_tenant("acme")
    since = service.set_tenant("acme", disabled=True).disabled_at
    assert since is not None
    assert service.set_tenant("acme", disabled=True).disabled_at == since
    assert service.set_tenant("acme", weight=2).disabled_at == since
    assert service.set_tenant("acme", disabled=False).disabled_at is None


def test_names_are_unique(service: AccountsService) -> None:
    service.create_tenant("acme")
    with pytest.raises(NameTakenError, match="acme"):
        service.create_tenant("acme")
    assert len(service.list_tenants()) == 1


BAD_NAMES = ("", "A", "-a", "a-", "a b", "a" * 64, "é", "a\n", "'; DROP TABLE tenants; --", "\x00")


def test_other_names_are_refused(service: AccountsService) -> None:
    for name in BAD_NAMES:
        with pytest.raises(InvalidAccountError, match="name"):
            service.create_tenant(name)
    assert service.list_tenants() == []


BAD_POLICIES: tuple[dict[str, Any], ...] = (
    {"weight": 0},
    {"weight": -1},
    {"weight": 1000.1},
    {"weight": float("nan")},
    {"weight": float("inf")},
    {"max_in_flight": 0},
    {"max_in_flight": 10**12},
    {"max_queued": 0},
    {"max_queued": -5},
    {"requests_per_minute": -1},
    {"tokens_per_minute": 10**12},
    {"max_jobs": -1},
)


def test_other_policies_are_refused(service: AccountsService) -> None:
    made = service.create_tenant("acme")
    for change in BAD_POLICIES:
        with pytest.raises(InvalidAccountError):
            service.create_tenant("other", **change)
        with pytest.raises(InvalidAccountError):
            service.set_tenant("acme", **change)
    assert service.list_tenants() == [made]


def test_unknown_tenants_and_keys_are_named(service: AccountsService) -> None:
    service.create_tenant("acme")
    for name in ("nobody", "", "' OR 1=1 --", "ten_x"):
        for call in (service.set_tenant, service.create_key, service.list_keys, service.revoke_key):
            with pytest.raises(UnknownAccountError, match="there is no"):
                call(name)


# -- keys -------------------------------------------------------------------------------------
def test_a_key_is_kept_without_its_secret(service: AccountsService, engine: Engine) -> None:
    tenant = service.create_tenant("acme")
    new = service.create_key(
        "acme", name="ci", scopes=["jobs", "admin"], expires_in=timedelta(days=30)
    )
    assert keys.has_checksum(new.secret)
    assert new.secret.startswith("fb_test_")
    assert new.key.tenant_id == tenant.id
    assert new.key.expires_at == new.key.created_at + timedelta(days=30)
    assert service.list_keys() == service.list_keys("acme") == [new.key]
    with reading(engine) as connection:
        dump = str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert new.key.prefix in dump
    assert new.secret not in dump
    assert new.secret[len(new.key.prefix) :] not in dump


def test_a_dump_verifies_nothing_without_the_pepper(
    service: AccountsService, engine: Engine, settings: Settings
) -> None:
    service.create_tenant("acme")
    secret = service.create_key("acme").secret
    with reading(engine) as connection:
        stored = connection.scalar(text("SELECT digest FROM api_keys"))
    assert stored is not None
    guesses = [b"", b"pepper", b"pepper-of-the-test", settings.auth.key_env.encode()]
    assert bytes(stored) not in {keys.digest(secret, guess) for guess in guesses}
    pepper = settings.auth.pepper.get_secret_value().encode()
    assert bytes(stored) == keys.digest(secret, pepper)


def test_secrets_show_in_no_repr_and_no_log(service: AccountsService) -> None:
    service.create_tenant("acme")
    with structlog.testing.capture_logs() as lines:
        new = service.create_key("acme")
        service.revoke_key(new.key.id)
    for shown in (repr(new), repr(lines), repr(service.list_keys())):
        assert new.secret[len(new.key.prefix) :] not in shown


def test_revocation_is_final(service: AccountsService) -> None:
    service.create_tenant("acme")
    key = service.create_key("acme").key
    revoked = service.revoke_key(key.id)
    assert revoked.revoked_at is not None
    assert service.revoke_key(key.id) == revoked
    assert service.list_keys("acme") == [revoked]
    assert revoked.status(datetime.now(UTC)) == "revoked"


BAD_KEYS: tuple[dict[str, Any], ...] = (
    {"scopes": []},
    {"scopes": ["root"]},
    {"scopes": "jobs"},
    {"name": "a" * 101},
    {"name": "a\x1b[31m"},
    {"expires_in": timedelta()},
    {"expires_in": timedelta(days=-1)},
    {"expires_in": timedelta(days=3651)},
)


def test_other_keys_are_refused(service: AccountsService) -> None:
    service.create_tenant("acme")
    for change in BAD_KEYS:
        with pytest.raises(InvalidAccountError):
            service.create_key("acme", **change)
    assert service.list_keys() == []


def test_without_a_pepper_no_key_is_made(service: AccountsService, settings: Settings) -> None:
    service.create_tenant("acme")
    bare = settings.model_copy(update={"auth": Auth()})
    with (
        AccountsService.from_settings(bare) as other,
        pytest.raises(SettingsError, match="FOREBAY_AUTH__PEPPER"),
    ):
        other.create_key("acme")


# -- the change counter -----------------------------------------------------------------------
def test_every_change_counts_and_a_refused_one_does_not(
    service: AccountsService, store: AccountStore
) -> None:
    assert store.counter() == 0
    service.create_tenant("acme")
    service.set_tenant("acme", weight=2)
    key = service.create_key("acme").key
    service.revoke_key(key.id)
    assert store.counter() == 4
    with pytest.raises(NameTakenError):
        service.create_tenant("acme")
    with pytest.raises(UnknownAccountError):
        service.set_tenant("other", weight=1)
    service.list_tenants()
    with pytest.raises(UnknownAccountError):
        service.set_key("key_x", max_jobs=1)
    service.set_key(key.id, max_jobs=1)
    assert store.counter() == 5
    store.note_use({key.id: datetime.now(UTC)}, older_than=datetime.now(UTC))
    assert store.counter() == 5


def test_changes_at_once_are_all_kept(settings: Settings, service: AccountsService) -> None:
    """Eight writers with connections of their own; none fails, none is lost."""
    service.create_tenant("acme")
    start = threading.Barrier(8)

    def work(number: int) -> None:
        with AccountsService.from_settings(settings) as own:
            start.wait(30)
            own.create_tenant(f"tenant-{number}")
            for _ in range(5):
                own.create_key("acme")
            own.set_tenant("acme", max_queued=100 + number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(service.list_tenants()) == 9
    assert len(service.list_keys("acme")) == 40


def test_one_of_two_tenants_with_the_same_name_is_refused(
    settings: Settings, service: AccountsService
) -> None:
    start = threading.Barrier(4)

    def work(_: int) -> bool:
        with AccountsService.from_settings(settings) as own:
            start.wait(30)
            try:
                own.create_tenant("acme")
            except NameTakenError:
                return False
            return True

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(work, range(4))) == [False, False, False, True]
    assert len(service.list_tenants()) == 1


def test_last_use_is_coarse(service: AccountsService, store: AccountStore) -> None:
    service.create_tenant("acme")
    key = service.create_key("acme").key
    first = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    soon, late = first + timedelta(seconds=30), first + timedelta(seconds=90)

    def last_used(at: datetime) -> datetime | None:
        store.note_use({key.id: at}, older_than=at - timedelta(seconds=60))
        return service.list_keys()[0].last_used_at

    assert last_used(first) == first
    assert last_used(soon) == first
    assert last_used(late) == late


# -- word to the broker -----------------------------------------------------------------------
def policy_in(broker: Any, tenant: str) -> tuple[float, ...]:
    hashes = (POLICY_WEIGHT, POLICY_CAP, POLICY_MAX_QUEUED)
    return tuple(float(broker.hget(name, tenant)) for name in hashes)


def test_policies_reach_the_broker(service: AccountsService, broker: Any) -> None:
    tenant = service.create_tenant("acme", weight=0.5, max_in_flight=3, max_queued=40)
    assert policy_in(broker, tenant.id) == (0.5, 3, 40)
    service.set_tenant("acme", weight=7)
    assert policy_in(broker, tenant.id) == (7, 3, 40)
    broker.flushall()
    assert service.publish_all() == 1
    assert policy_in(broker, tenant.id) == (7, 3, 40)


def test_every_change_is_noticed(service: AccountsService, broker: Any) -> None:
    with broker.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(ACCOUNTS_CHANNEL)
        subscription.get_message(timeout=PATIENCE_S)

        def noticed() -> bool:
            return subscription.get_message(timeout=PATIENCE_S) is not None

        service.create_tenant("acme")
        assert noticed()
        service.set_tenant("acme", weight=2)
        assert noticed()
        key = service.create_key("acme").key
        assert noticed()
        service.revoke_key(key.id)
        assert noticed()


def test_the_newest_policy_stays_when_two_changes_cross(
    settings: Settings, service: AccountsService, store: AccountStore
) -> None:
    """The first writer is held up between the database and Redis while a second one passes it."""
    told: list[float] = []

    class Crossing:
        def set_policy(self, tenant: str, policy: TenantPolicy) -> None:
            if policy.weight == 2 and 3 not in told:
                told.append(3)
                store.change_tenant(tenant, lambda found: _reweighed(found, 3))
            told.append(policy.weight)

        def notify(self) -> None: ...

    service.create_tenant("acme")
    slow = AccountsService(
        store, auth=settings.auth, defaults=TenantPolicy(), broadcaster=Crossing()
    )
    slow.set_tenant("acme", weight=2)
    assert told == [3, 2, 3]


def _reweighed(tenant: Any, weight: float) -> Any:
    from dataclasses import replace

    return replace(tenant, policy=replace(tenant.policy, weight=weight))


def test_a_change_stands_while_redis_is_away(engine: Engine, settings: Settings) -> None:
    away = settings.model_copy(update={"redis": Redis(url=SecretStr("redis://127.0.0.1:1/0"))})
    warnings: list[str] = []
    with AccountsService.from_settings(away, warn=warnings.append) as service:
        service.create_tenant("acme")
        key = service.create_key("acme").key
        service.revoke_key(key.id)
        assert [tenant.name for tenant in service.list_tenants()] == ["acme"]
        assert len(warnings) == 3
        assert all("stored" in line and "\n" not in line for line in warnings)
        with pytest.raises(BrokerError):
            service.publish_all()
