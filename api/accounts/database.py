"""The connection to the accounts database: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
)

from api.accounts.errors import DatabaseUnavailableError, SchemaError
from config.settings import Database, SettingsError

#: Longest a statement, a lock or a connection attempt may take; a caller never hangs on SQL.
_TIMEOUT_S: Final = 5

#: Execution option of connections that write: how long they wait for others. SQLite then locks at
#: BEGIN, so that two writers wait for each other instead of failing when the second one upgrades
#: its read lock.
_WRITES: Final = "forebay_writes_s"


def make_engine(settings: Database) -> Engine:
    """An engine that connects when it is first used. Raises `SettingsError` for a bad URL."""
    try:
        url = make_url(settings.url.get_secret_value())
    except (ArgumentError, ValueError):
        raise SettingsError("FOREBAY_DATABASE__URL=(hidden): isn't a database URL") from None
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own BEGIN comes too late to make a read and DDL transactional.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        wait_s = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql(f"PRAGMA busy_timeout={(wait_s or _TIMEOUT_S) * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if wait_s else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    limit_ms = _TIMEOUT_S * 1000
    return create_engine(
        url,
        # Few: one thread of an API process looks at the accounts, never a request.
        pool_size=2,
        max_overflow=2,
        pool_timeout=_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": _TIMEOUT_S,
            "tcp_user_timeout": limit_ms,
            "options": f"-c statement_timeout={limit_ms} -c lock_timeout={limit_ms}",
            "application_name": "forebay",
        },
    )


def create_file(engine: Engine) -> None:
    """Make the SQLite file and its folder, readable by the owner only; nothing on PostgreSQL."""
    path = _file(engine)
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise DatabaseUnavailableError(f"{path}: {error.strerror}") from None


def is_missing(engine: Engine) -> bool:
    """Whether the database is an SQLite file that isn't there; connecting would make it."""
    path = _file(engine)
    return path is not None and not path.exists()


def _file(engine: Engine) -> Path | None:
    name = engine.url.database
    if engine.dialect.name != "sqlite" or not name or name == ":memory:":
        return None
    return Path(name)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads. Raises `DatabaseUnavailableError` and `SchemaError`."""
    with _translated(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine, *, wait_s: int = _TIMEOUT_S) -> Iterator[Connection]:
    """A transaction that is committed at the end, unless an exception leaves it.

    `wait_s` is the longest wait for other writers; a longer one than usual is for work that may
    itself take long, which is then not cut short.
    """
    with _translated(), engine.connect() as connection:
        connection = connection.execution_options(**{_WRITES: wait_s})
        with connection.begin():
            if wait_s > _TIMEOUT_S and connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {wait_s * 1000}")
            yield connection


@contextmanager
def _translated() -> Iterator[None]:
    """Name the cause without the statement: parameters and URLs hold secrets."""
    try:
        yield
    except IntegrityError:
        # Left to the store, which knows what was violated.
        raise
    except DBAPIError as error:
        cause = str(error.orig).strip().split("\n", 1)[0]
        if isinstance(error, ProgrammingError) or "no such table" in cause:
            raise SchemaError(f"the accounts database isn't set up ({cause})") from None
        raise DatabaseUnavailableError(f"the accounts database can't be used: {cause}") from None
    except SQLAlchemyError as error:
        kind = type(error).__name__
        raise DatabaseUnavailableError(f"the accounts database can't be used: {kind}") from None
