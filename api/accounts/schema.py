"""The schema of the accounts database: which revision it has, and bringing it to ours."""

from __future__ import annotations

import logging
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from api.accounts.database import create_file, is_missing, reading, writing
from api.accounts.errors import SchemaError

# Says at every look at the revision which database it looks at.
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)

#: PostgreSQL advisory lock held while migrating (any number nobody else uses).
_LOCK: Final = 0x464F5245
#: Longest wait for another process that migrates.
_WAIT_S: Final = 60


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Bring the schema to the newest revision; returns the one found and the one reached.

    All in one transaction; a second process that does the same waits and finds nothing to do.
    Raises `SchemaError` on a schema newer than this version of Forebay knows.
    """
    create_file(engine)
    with writing(engine, wait_s=_WAIT_S) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        found = _revision(connection)
        _refuse_newer(found)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return found, head()


def check(engine: Engine) -> None:
    """Raises `SchemaError` when the schema is missing, older or newer than ours."""
    if is_missing(engine):
        found = None
    else:
        with reading(engine) as connection:
            found = _revision(connection)
    _refuse_newer(found)
    if found != head():
        state = "is empty" if found is None else f"is at revision {found}, {head()} is needed"
        raise SchemaError(f"the accounts database {state}: run `forebay db upgrade`")


def head() -> str:
    """The newest revision this version of Forebay knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(revision: str | None) -> None:
    known = ScriptDirectory.from_config(_config()).walk_revisions()
    if revision is not None and revision not in {script.revision for script in known}:
        raise SchemaError(
            f"the accounts database is at revision {revision}, which is newer than this version of"
            " Forebay: upgrade Forebay, or restore the database from before its upgrade"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "api.accounts:migrations")
    config.set_main_option("path_separator", "os")
    return config
