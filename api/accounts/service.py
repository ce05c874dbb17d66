"""Changes to tenants and keys, and word of them to the broker and to every API process.

The database decides. What Redis holds of it (policies, the notice of a change) is a copy that the
directory of each API process puts right again, so a change stands while Redis is away.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final, Unpack

from api.accounts.announcements import Broadcaster, RedisBroadcaster
from api.accounts.bounds import PolicyChanges, changed_limits, changed_policy
from api.accounts.database import make_engine
from api.accounts.errors import InvalidAccountError
from api.accounts.records import ApiKey, NewKey, Tenant
from api.accounts.store import AccountStore
from api.auth import keys
from api.auth.authenticator import peppers
from api.auth.principal import SCOPES
from broker.errors import BrokerError
from broker.limits import NO_LIMITS
from broker.policies import TenantPolicy
from config.logs import get_logger
from config.settings import Auth, Settings

log = get_logger(__name__)

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_MAX_KEY_NAME: Final = 100
_MAX_LIFETIME: Final = timedelta(days=3650)
_ID_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


class AccountsService:
    """Blocking; used by the command line and by `forebay up`, not on the way of a job.

    Every call may raise an `AccountsError`. `warn` gets one line when a change stands but could
    not be made known at once.
    """

    def __init__(
        self,
        store: AccountStore,
        *,
        auth: Auth,
        defaults: TenantPolicy,
        broadcaster: Broadcaster,
        warn: Callable[[str], None] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._auth = auth
        self._defaults = defaults
        self._broadcaster = broadcaster
        self._warn = warn or (lambda line: log.warning("account_change_not_announced", why=line))
        self._close = close

    @classmethod
    def from_settings(
        cls, settings: Settings, *, warn: Callable[[str], None] | None = None
    ) -> AccountsService:
        """Raises `SettingsError`; connects to nothing yet."""
        engine = make_engine(settings.database)
        broadcaster = RedisBroadcaster.from_settings(settings)

        def close() -> None:
            engine.dispose()
            broadcaster.close()

        return cls(
            AccountStore(engine),
            auth=settings.auth,
            defaults=TenantPolicy(
                weight=settings.queue.default_weight,
                max_in_flight=settings.queue.default_max_in_flight,
                max_queued=settings.queue.default_max_queued,
            ),
            broadcaster=broadcaster,
            warn=warn,
            close=close,
        )

    def close(self) -> None:
        self._close()

    def __enter__(self) -> AccountsService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- tenants --------------------------------------------------------------------------------
    def create_tenant(
        self,
        name: str,
        **policy: Unpack[PolicyChanges],
    ) -> Tenant:
        """A new tenant; what isn't given is the default of `queue`.

        Raises `InvalidAccountError` or `NameTakenError`.
        """
        if not _NAME.fullmatch(name):
            raise InvalidAccountError(
                "a tenant's name is 1-63 of a-z, 0-9, '.', '_', '-', and begins and ends with a"
                " letter or digit"
            )
        now = _now()
        tenant = Tenant(
            id=_new_id("ten"),
            name=name,
            policy=changed_policy(self._defaults, **policy),
            created_at=now,
            updated_at=now,
        )
        self._store.add_tenant(tenant)
        log.info("tenant_created", tenant=tenant.id, name=name)
        self._announce(tenant)
        return tenant

    def set_tenant(
        self,
        name_or_id: str,
        *,
        disabled: bool | None = None,
        **policy: Unpack[PolicyChanges],
    ) -> Tenant:
        """Change what is given. A disabled tenant's credentials are refused; its jobs go on.

        Raises `UnknownAccountError` or `InvalidAccountError`.
        """

        def change(tenant: Tenant) -> Tenant:
            now = _now()
            disabled_at = tenant.disabled_at
            if disabled is not None:
                disabled_at = (disabled_at or now) if disabled else None
            return replace(
                tenant,
                policy=changed_policy(tenant.policy, **policy),
                updated_at=now,
                disabled_at=disabled_at,
            )

        tenant = self._store.change_tenant(name_or_id, change)
        log.info("tenant_changed", tenant=tenant.id, disabled=tenant.disabled_at is not None)
        self._announce(tenant)
        return tenant

    def list_tenants(self) -> list[Tenant]:
        """All, by name."""
        return self._store.tenants()

    def get_tenant(self, name_or_id: str) -> Tenant:
        """Raises `UnknownAccountError`."""
        return self._store.tenant(name_or_id)

    # -- keys -----------------------------------------------------------------------------------
    def create_key(
        self,
        tenant: str,
        *,
        name: str = "",
        scopes: Iterable[str] = ("jobs",),
        expires_in: timedelta | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_jobs: int | None = None,
    ) -> NewKey:
        """A new key of a tenant (name or id). Its secret is in the answer and nowhere else.

        Raises `UnknownAccountError`, `InvalidAccountError`, and `SettingsError` without a pepper.
        """
        pepper = peppers(self._auth)[self._auth.pepper_version]
        granted = frozenset(scopes)
        if not granted or not granted <= SCOPES:
            raise InvalidAccountError(f"scopes are {' and '.join(sorted(SCOPES))}")
        if len(name) > _MAX_KEY_NAME or not name.isprintable():
            raise InvalidAccountError(f"a key's name is up to {_MAX_KEY_NAME} printable characters")
        if expires_in is not None and not timedelta() < expires_in <= _MAX_LIFETIME:
            raise InvalidAccountError(
                f"a key lives more than 0 and up to {_MAX_LIFETIME.days} days"
            )
        owner = self._store.tenant(tenant)
        secret = keys.generate(self._auth.key_env)
        now = _now()
        key = ApiKey(
            id=_new_id("key"),
            tenant_id=owner.id,
            tenant_name=owner.name,
            name=name,
            prefix=secret.prefix,
            scopes=granted,
            limits=changed_limits(
                NO_LIMITS,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_jobs=max_jobs,
            ),
            created_at=now,
            expires_at=now + expires_in if expires_in is not None else None,
        )
        self._store.add_key(
            key,
            digest=keys.digest(secret.text, pepper),
            pepper_version=self._auth.pepper_version,
        )
        log.info("key_created", key_id=key.id, tenant=owner.id, scopes=sorted(granted))
        self._announce()
        return NewKey(key=key, secret=secret.text)

    def list_keys(self, tenant: str | None = None) -> list[ApiKey]:
        """All, or those of one tenant (name or id); raises `UnknownAccountError`."""
        return self._store.keys(None if tenant is None else self._store.tenant(tenant).id)

    def set_key(
        self,
        key_id: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_jobs: int | None = None,
    ) -> ApiKey:
        """Change the limits that are given; 0 takes one away.

        Raises `UnknownAccountError` or `InvalidAccountError`.
        """
        key = self._store.change_key(
            key_id,
            lambda limits: changed_limits(
                limits,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_jobs=max_jobs,
            ),
        )
        log.info("key_changed", key_id=key.id, tenant=key.tenant_id)
        self._announce()
        return key

    def revoke_key(self, key_id: str) -> ApiKey:
        """For good; works on every API process within `auth.refresh_s` even if Redis is away.

        Raises `UnknownAccountError`.
        """
        key = self._store.revoke_key(key_id, at=_now())
        log.info("key_revoked", key_id=key.id, tenant=key.tenant_id)
        self._announce()
        return key

    def check_schema(self) -> None:
        """Raises `SchemaError` unless the database is at our revision."""
        self._store.check_schema()

    # -- word to the broker ---------------------------------------------------------------------
    def publish_all(self) -> int:
        """Give the broker every tenant's policy again; returns how many. Raises `BrokerError`."""
        tenants = self._store.tenants()
        for tenant in tenants:
            self._broadcaster.set_policy(tenant.id, tenant.policy)
        return len(tenants)

    def _announce(self, tenant: Tenant | None = None) -> None:
        try:
            if tenant is not None:
                self._publish(tenant)
            self._broadcaster.notify()
        except BrokerError as error:
            self._warn(
                f"the change is stored, but Redis is away ({error}); it takes effect within seconds"
                " of its return"
            )

    def _publish(self, tenant: Tenant) -> None:
        # Two changes may reach Redis the other way round than the database. Whoever writes last
        # looks at the database after that, so the newest policy is what stays.
        policy: TenantPolicy | None = None
        while policy != tenant.policy:
            policy = tenant.policy
            self._broadcaster.set_policy(tenant.id, policy)
            tenant = self._store.tenant(tenant.id)


def _new_id(kind: str) -> str:
    """`<kind>_` and 20 characters: 100 random bits."""
    return f"{kind}_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(20))


def _now() -> datetime:
    return datetime.now(UTC)
