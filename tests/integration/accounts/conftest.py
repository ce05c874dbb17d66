"""Accounts on real databases: SQLite, and a PostgreSQL started once a session."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from api.accounts import schema
from api.accounts.database import make_engine
from api.accounts.service import AccountsService
from api.accounts.store import AccountStore
from config.settings import Auth, Database, Redis, Settings
from tests.conftest import PATIENCE_S, free_port

Until = Callable[..., Awaitable[float]]


def _binaries(scratch: Path) -> Path | None:
    """The folder of PostgreSQL's programs: those of the pgserver wheel, or Debian's."""
    # Found without importing it: the package does much more than hold the programs.
    wheel = importlib.util.find_spec("pgserver")
    if wheel is not None and wheel.submodule_search_locations:
        package = Path(wheel.submodule_search_locations[0])
        if os.geteuid() != 0:
            return package / "pginstall" / "bin"
        # The server refuses to run as root, and another user may not be let into the folder of
        # the virtual environment. The libraries are found relative to the programs.
        for name in ("pgserver/pginstall", "pgserver.libs"):
            if (package.parent / name).exists():
                ignored = shutil.ignore_patterns("include")
                shutil.copytree(package.parent / name, scratch / name, ignore=ignored)
        return scratch / "pgserver" / "pginstall" / "bin"
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A libpq string (without `dbname`) for a superuser of a server without fsync."""
    with tempfile.TemporaryDirectory(prefix="forebay-pg-") as folder:
        scratch = Path(folder)
        binaries = _binaries(scratch)
        if binaries is None:
            if os.environ.get("CI"):
                pytest.fail("PostgreSQL is missing (pip install pgserver)")
            pytest.skip("PostgreSQL is missing (pip install pgserver)")
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        data = scratch / "data"
        data.mkdir()
        scratch.chmod(0o755)
        if as_user:
            shutil.chown(data, as_user["user"], as_user["group"])
        subprocess.run(
            [
                *(binaries / "initdb", "-D", data, "-U", "forebay", "-A", "trust"),
                *("--encoding=UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd=data,
            **as_user,
        )
        port = free_port()
        server = subprocess.Popen(
            [
                *(binaries / "postgres", "-D", data, "-p", str(port), "-F", "-k", ""),
                *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=50"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=data,
            **as_user,
        )
        try:
            where = f"host=127.0.0.1 port={port} user=forebay"
            _await_server(where, server)
            yield where
        finally:
            # Fast shutdown: open connections are ended.
            server.send_signal(signal.SIGINT)
            server.wait(20)


def _await_server(where: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            psycopg.connect(f"{where} dbname=postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def admin_sql(postgresql: str) -> Iterator[Callable[[str], None]]:
    """Runs a statement as superuser, outside of any transaction."""
    with psycopg.connect(f"{postgresql} dbname=postgres", autocommit=True) as connection:
        yield lambda statement: connection.execute(statement.encode()).close()


@pytest.fixture
def postgresql_url(postgresql: str, admin_sql: Callable[[str], None]) -> Iterator[str]:
    """SQLAlchemy URL of an empty database."""
    name = f"test_{time.monotonic_ns()}"
    admin_sql(f"CREATE DATABASE {name}")
    parts = dict(part.split("=") for part in postgresql.split())
    yield f"postgresql+psycopg://{parts['user']}@{parts['host']}:{parts['port']}/{name}"
    admin_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLAlchemy URL of an empty database, once SQLite and once PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'accounts.db'}"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def empty_engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(Database(url=SecretStr(database_url)))
    yield engine
    engine.dispose()


@pytest.fixture
def engine(empty_engine: Engine) -> Engine:
    """An engine on a database with the schema."""
    schema.upgrade(empty_engine)
    return empty_engine


@pytest.fixture
def store(engine: Engine) -> AccountStore:
    return AccountStore(engine)


@pytest.fixture
def settings(database_url: str, valkey: str) -> Settings:
    """Of a process that works on the test's database and Redis."""
    return Settings(
        _env_file=None,
        database=Database(url=SecretStr(database_url)),
        redis=Redis(url=SecretStr(valkey)),
        auth=Auth(pepper=SecretStr("pepper-of-the-tests"), key_env="test"),
    )


@pytest.fixture
def warnings() -> list[str]:
    """What the service said it could not announce."""
    return []


@pytest.fixture
def service(engine: Engine, settings: Settings, warnings: list[str]) -> Iterator[AccountsService]:
    with AccountsService.from_settings(settings, warn=warnings.append) as made:
        yield made


@pytest.fixture
def until() -> Until:
    """Wait for something another task or process brings about; gives the seconds it took."""

    async def wait(condition: Callable[[], bool], *, within_s: float = PATIENCE_S) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < within_s, "it did not happen in time"
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    return wait
