"""The accounts a fresh stack begins with: the schema, a tenant `default`, an admin key."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

from api.accounts import schema
from api.accounts.database import make_engine
from api.accounts.errors import NameTakenError
from api.accounts.service import AccountsService
from api.auth import keys
from api.cli.datadir import AdminKey, DataDir
from config.settings import Settings

#: Owner of the admin key; jobs sent with it belong to this tenant.
TENANT = "default"


def prepare_accounts(settings: Settings, home: DataDir) -> str:
    """Bring the schema up to date, tell the broker all policies, and return the admin key.

    The key of an earlier start is kept as long as it works. Raises `AccountsError`, `BrokerError`
    and `SettingsError`.
    """
    engine = make_engine(settings.database)
    try:
        schema.upgrade(engine)
    finally:
        engine.dispose()
    with AccountsService.from_settings(settings) as service:
        if TENANT not in {tenant.name for tenant in service.list_tenants()}:
            # Another stack on the same database may be quicker.
            with suppress(NameTakenError):
                service.create_tenant(TENANT)
        service.publish_all()
        pepper = settings.auth.pepper.get_secret_value().encode()
        kept = home.admin_key()
        if kept is not None and _works(service, kept, pepper):
            return kept.secret
        made = service.create_key(TENANT, name="forebay up", scopes=("jobs", "admin"))
        home.keep_admin_key(
            AdminKey(
                id=made.key.id,
                secret=made.secret,
                digest=keys.digest(made.secret, pepper).hex(),
            )
        )
        return made.secret


def _works(service: AccountsService, kept: AdminKey, pepper: bytes) -> bool:
    now = datetime.now(UTC)
    known = {key.id: key for key in service.list_keys(TENANT)}
    return (
        kept.id in known
        and known[kept.id].status(now) == "active"
        and keys.digest(kept.secret, pepper).hex() == kept.digest
    )
