"""`forebay tenants`, `forebay keys` and `forebay db`, from their arguments to what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from structlog.testing import capture_logs

from api.accounts import schema
from api.auth import keys
from api.cli import main
from broker.keys import POLICY_WEIGHT
from config import logs
from config.settings import Settings

ROOT = Path(__file__).parents[3]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One database is enough here: the commands know nothing of its kind."""
    return f"sqlite:///{tmp_path / 'accounts.db'}"


def _environment(settings: Settings) -> dict[str, str]:
    return {
        "COLUMNS": "200",
        "FOREBAY_DATABASE__URL": settings.database.url.get_secret_value(),
        "FOREBAY_REDIS__URL": settings.redis.url.get_secret_value(),
        "FOREBAY_AUTH__PEPPER": settings.auth.pepper.get_secret_value(),
    }


@pytest.fixture
def forebay(settings: Settings, tmp_path: Path) -> Run:
    """Calls the command on the test's database and Redis, from an empty folder."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch, capture_logs():
            patch.chdir(tmp_path)
            # Logging is the process's, and this one is pytest's.
            patch.setattr(logs, "configure", lambda *_, **__: None)
            for name, value in (_environment(settings) | changes).items():
                patch.setenv(name, value)
            done = CliRunner().invoke(main, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def forebay_process(settings: Settings, tmp_path: Path) -> Run:
    """The same as a process of its own."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "api.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **_environment(settings), **changes},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line (after click's usage lines, if any) a command failed with."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines[-1].startswith("Error: "), done.stderr
    assert all(line.startswith(("Usage:", "Try ")) for line in lines[:-1]), done.stderr
    return lines[-1]


def test_from_an_empty_database_to_a_revoked_key(forebay: Run, valkey: str) -> None:
    assert "forebay db upgrade" in failed(forebay("tenants", "list"), 1)
    upgraded = forebay("db", "upgrade", "--json")
    assert json.loads(upgraded.stdout) == {"from": None, "to": schema.head()}
    assert "already" in forebay("db", "upgrade").stdout

    created = forebay("tenants", "create", "acme", "--weight", "2.5", "--max-jobs", "5", "--json")
    tenant = json.loads(created.stdout)
    assert (tenant["max_jobs"], tenant["requests_per_minute"]) == (5, 0)
    assert (tenant["name"], tenant["weight"], tenant["priority"]) == ("acme", 2.5, "interactive")
    with redis.Redis.from_url(valkey) as client:
        assert float(client.hget(POLICY_WEIGHT, tenant["id"]) or 0) == 2.5

    assert tenant["allow_logprobs"] is False
    options = ("--priority", "batch", "--disable", "--allow-logprobs", "--json")
    changed = forebay("tenants", "set", "acme", *options)
    assert json.loads(changed.stdout)["allow_logprobs"] is True
    assert json.loads(changed.stdout)["priority"] == "batch"
    assert json.loads(changed.stdout)["disabled_at"] is not None
    assert "disabled" in forebay("tenants", "list").stdout
    forebay("tenants", "set", "acme", "--tokens-per-minute", "9000", "--max-jobs", "0")
    assert "9,000 tok/min" in forebay("tenants", "list").stdout
    forebay("tenants", "set", "acme", "--enable")

    made = forebay("keys", "create", "acme", "--name", "[red]ci", "--expires", "30d", "--json")
    key = json.loads(made.stdout)
    assert keys.has_checksum(key["key"])
    life = datetime.fromisoformat(key["expires_at"]) - datetime.fromisoformat(key["created_at"])
    assert life == timedelta(days=30)

    plain = forebay("keys", "create", "acme", "--requests-per-minute", "60")
    assert "60 req/min" in forebay("keys", "list", "acme").stdout
    limited = forebay("keys", "set", key["id"], "--max-jobs", "5", "--json").stdout
    assert [found["max_jobs"] for found in json.loads(limited)] == [5]
    assert "5 jobs" in forebay("keys", "list", "acme").stdout
    assert keys.has_checksum(plain.stdout.strip())
    assert plain.stdout.strip() not in plain.stderr

    listed = forebay("keys", "list", "acme")
    assert "[red]ci" in listed.stdout
    assert key["key"] not in listed.stdout + forebay("keys", "list", "--json").stdout

    assert "revoked" in forebay("keys", "revoke", key["id"]).stdout
    after = {found["id"]: found for found in json.loads(forebay("keys", "list", "--json").stdout)}
    assert after[key["id"]]["status"] == "revoked"
    assert len(after) == 2


@pytest.mark.usefixtures("engine")
def test_mistakes_are_one_line_each(forebay: Run) -> None:
    assert "no tenant 'nobody'" in failed(forebay("keys", "create", "nobody"), 1)
    assert "no key 'key_x'" in failed(forebay("keys", "revoke", "key_x"), 1)
    assert "no key 'key_x'" in failed(forebay("keys", "set", "key_x", "--max-jobs", "1"), 1)
    assert "name" in failed(forebay("tenants", "create", "A B"), 2)
    assert "weight" in failed(forebay("tenants", "create", "acme", "--weight", "0"), 2)
    assert "12h, 30d" in failed(forebay("keys", "create", "acme", "--expires", "soon"), 2)
    assert "root" in failed(forebay("keys", "create", "acme", "--scope", "root"), 2)
    without = forebay("keys", "create", "acme", FOREBAY_AUTH__PEPPER="")
    assert "FOREBAY_AUTH__PEPPER" in failed(without, 2)
    wrong = forebay("tenants", "list", FOREBAY_DATABASE__URL="mysql://x")
    assert "FOREBAY_DATABASE__URL" in failed(wrong, 2)
    away = forebay(
        "tenants", "list", FOREBAY_DATABASE__URL="postgresql+psycopg://u:pw@127.0.0.1:1/x"
    )
    assert "pw" not in failed(away, 1)


@pytest.mark.usefixtures("engine")
def test_a_change_without_redis_stands_with_a_warning(forebay_process: Run) -> None:
    done = forebay_process(
        "tenants", "create", "acme", "--json", FOREBAY_REDIS__URL="redis://127.0.0.1:1"
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["name"] == "acme"
    assert done.stderr.startswith("Warning: the change is stored, but Redis is away")
    assert len(done.stderr.splitlines()) == 1
    assert "no key 'key_x'" in failed(forebay_process("keys", "revoke", "key_x"), 1)
