"""The migrations lead to exactly the tables of the models, on both databases."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import CheckConstraint, Engine, inspect, text
from sqlalchemy.exc import IntegrityError

from api.accounts import schema
from api.accounts.database import make_engine, reading, writing
from api.accounts.errors import DatabaseUnavailableError, SchemaError
from api.accounts.store import AccountStore
from api.accounts.tables import Base
from broker.jobs import Band
from broker.limits import NO_LIMITS
from broker.policies import TenantPolicy
from config.settings import Database, SettingsError


def test_models_and_migrated_schema_are_the_same(engine: Engine) -> None:
    with reading(engine) as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_check_constraints_are_the_same_too(engine: Engine) -> None:
    # Alembic's comparison leaves these out.
    with reading(engine) as connection:
        inspector = inspect(connection)
        for table in Base.metadata.sorted_tables:
            found = {str(check["name"]) for check in inspector.get_check_constraints(table.name)}
            wanted = {
                str(constraint.name)
                for constraint in table.constraints
                if isinstance(constraint, CheckConstraint)
            }
            assert found == wanted


def test_upgrade_says_what_it_did_and_may_be_repeated(empty_engine: Engine) -> None:
    assert schema.upgrade(empty_engine) == (None, schema.head())
    assert schema.upgrade(empty_engine) == (schema.head(), schema.head())
    schema.check(empty_engine)


def test_several_upgrades_at_once_do_it_once(empty_engine: Engine) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: schema.upgrade(empty_engine)[0], range(4)))
    assert sorted(found, key=str) == sorted([None, *[schema.head()] * 3], key=str)


def test_an_empty_database_is_refused(empty_engine: Engine) -> None:
    with pytest.raises(SchemaError, match="forebay db upgrade"):
        schema.check(empty_engine)


def test_a_newer_schema_is_refused_and_left_alone(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for attempt in (schema.check, schema.upgrade):
        with pytest.raises(SchemaError, match="9999, which is newer") as caught:
            attempt(engine)
        assert "\n" not in str(caught.value)
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_a_failed_migration_leaves_nothing_behind(empty_engine: Engine) -> None:
    def fail_after_all_is_done() -> None:
        with writing(empty_engine) as connection:
            config = schema._config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_after_all_is_done()
    with reading(empty_engine) as connection:
        assert inspect(connection).get_table_names() == []


def test_downgrade_removes_what_upgrade_made(engine: Engine) -> None:
    with writing(engine) as connection:
        config = schema._config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with reading(engine) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]


def test_accounts_survive_the_way_up_and_down(engine: Engine) -> None:
    store = AccountStore(engine)

    def migrate(to: str) -> None:
        with writing(engine) as connection:
            config = schema._config()
            config.attributes["connection"] = connection
            (command.upgrade if to == "head" else command.downgrade)(config, to)

    migrate("0001")
    with writing(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO tenants (id, name, weight, max_in_flight, max_queued,"
                " default_priority, created_at, updated_at)"
                " VALUES ('ten_x', 't', 2, 3, 4, 'batch', '2026-01-01', '2026-01-01')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO api_keys (id, tenant_id, name, prefix, digest, pepper_version, scopes,"
                " created_at) VALUES ('key_x', 'ten_x', '', '', '', 1, 'jobs', '2026-01-01')"
            )
        )
    migrate("head")
    assert store.tenant("t").policy == TenantPolicy(
        weight=2, max_in_flight=3, max_queued=4, default_band=Band.BATCH
    )
    (key,) = store.keys()
    assert (key.id, key.limits) == ("key_x", NO_LIMITS)
    migrate("0001")
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM api_keys")) == 1


def test_the_database_itself_refuses_bad_policies(engine: Engine) -> None:
    statement = (
        "INSERT INTO tenants (id, name, weight, max_in_flight, max_queued, default_priority,"
        " created_at, updated_at) VALUES ('ten_x', 't', {}, '2026-01-01', '2026-01-01')"
    )
    for values in ("0, 1, 1, 'batch'", "1, 0, 1, 'batch'", "1, 1, 0, 'batch'", "1, 1, 1, 'x'"):
        with pytest.raises(IntegrityError), writing(engine) as connection:
            connection.execute(text(statement.format(values)))
    with writing(engine) as connection:
        connection.execute(text(statement.format("1, 1, 1, 'batch'")))


def test_keys_need_their_tenant(engine: Engine) -> None:
    statement = (
        "INSERT INTO api_keys (id, tenant_id, name, prefix, digest, pepper_version, scopes,"
        " created_at) VALUES ('key_x', 'ten_none', '', '', '', 1, '', '2026-01-01')"
    )
    with pytest.raises(IntegrityError), writing(engine) as connection:
        connection.execute(text(statement))


def test_the_sqlite_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "accounts.db"
    engine = make_engine(Database(url=SecretStr(f"sqlite:///{path}")))
    schema.upgrade(engine)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with reading(engine) as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA busy_timeout")) == 5000
    engine.dispose()


def test_a_file_that_is_no_database_is_named_as_unusable(tmp_path: Path) -> None:
    path = tmp_path / "accounts.db"
    path.write_text("no database" * 100)
    engine = make_engine(Database(url=SecretStr(f"sqlite:///{path}")))
    with pytest.raises(DatabaseUnavailableError, match="not a database"):
        schema.check(engine)
    engine.dispose()


def test_a_server_that_is_away_is_named_without_its_password() -> None:
    url = "postgresql+psycopg://forebay:hunter2@127.0.0.1:1/forebay"
    engine = make_engine(Database(url=SecretStr(url)))
    with pytest.raises(DatabaseUnavailableError) as caught:
        schema.check(engine)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_that_is_none_stops_the_start() -> None:
    url = "postgresql+psycopg://forebay:hunter2@host:port/x"
    with pytest.raises(SettingsError, match="FOREBAY_DATABASE__URL") as caught:
        make_engine(Database(url=SecretStr(url)))
    assert "hunter2" not in str(caught.value)


def test_migrations_work_from_an_installed_package(tmp_path: Path) -> None:
    """What the build puts into a package is enough; the checkout is out of reach."""
    root, source, installed = Path(__file__).parents[3], tmp_path / "source", tmp_path / "lib"
    for folder in ("api", "broker", "config", "infra", "loadtests", "workers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / folder, source / folder, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(root / name, source / name)
    (source / "README.md").touch()
    (source / "LICENSE").touch()
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()"]
    subprocess.run(
        [*build, "build_py", "--build-lib", installed], cwd=source, check=True, capture_output=True
    )
    assert list(installed.glob("api/accounts/migrations/*.mako"))
    program = (
        "from api.accounts import database, schema; from config.settings import load;"
        "print(schema.__file__, schema.upgrade(database.make_engine(load().database)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(installed),
            "FOREBAY_DATABASE__URL": f"sqlite:///{tmp_path / 'a.db'}",
        },
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(installed))
    assert f"(None, '{schema.head()}')" in done.stdout
