"""Where commands find the stack, and what its data directory keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from api.cli.context import resolve, resolve_target
from api.cli.datadir import AdminKey, DataDir, DataDirBusyError, RunFile
from api.cli.failures import MISUSED, CommandError
from config.settings import SettingsError

RUN = RunFile(
    pid=1,
    api="http://127.0.0.1:7001",
    flower="",
    metrics="",
    admin_key="fb_live_run",
    redis_url="redis://:pw@127.0.0.1:7002/0",
    database_url="sqlite:////run/accounts.db",
    env={"FOREBAY_AUTH__PEPPER": "run-pepper", "FOREBAY_QUEUE__LEASE_TTL_S": "4"},
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def running(tmp_path: Path) -> DataDir:
    """The default data directory, as a running `forebay up` leaves it."""
    home = DataDir(tmp_path / ".forebay")
    home.create()
    home.lock()
    home.write_run(RUN)
    return home


def test_nothing_runs_and_nothing_is_set() -> None:
    settings = resolve()
    assert settings.redis.url.get_secret_value() == "redis://127.0.0.1:6379/0"
    with pytest.raises(CommandError, match="no running stack found") as caught:
        resolve_target()
    assert caught.value.exit_code == MISUSED


@pytest.mark.usefixtures("running")
def test_the_default_directory_fills_in() -> None:
    settings = resolve()
    assert settings.redis.url.get_secret_value() == RUN.redis_url
    assert settings.database.url.get_secret_value() == RUN.database_url
    assert settings.auth.pepper.get_secret_value() == "run-pepper"
    assert settings.queue.lease_ttl_s == 4
    target = resolve_target()
    assert (target.url, target.key) == (RUN.api, RUN.admin_key)


def test_the_environment_wins_over_the_default_directory(
    running: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_REDIS__URL", "redis://elsewhere:1/0")
    monkeypatch.setenv("FOREBAY_URL", "http://elsewhere:2/")
    monkeypatch.setenv("FOREBAY_API_KEY", "fb_live_env")
    settings = resolve()
    assert settings.redis.url.get_secret_value() == "redis://elsewhere:1/0"
    assert settings.auth.pepper.get_secret_value() == "run-pepper"
    target = resolve_target()
    assert (target.url, target.key) == ("http://elsewhere:2", "fb_live_env")
    # A directory that was asked for wins over both.
    settings = resolve(running.root)
    assert settings.redis.url.get_secret_value() == RUN.redis_url
    assert resolve_target(running.root).key == RUN.admin_key
    # Options win over everything.
    target = resolve_target(running.root, url="http://opt", key="k")
    assert (target.url, target.key) == ("http://opt", "k")


def test_a_run_file_without_its_process_is_stale(tmp_path: Path) -> None:
    home = DataDir(tmp_path / ".forebay")
    home.create()
    os.close(home.lock())
    home.write_run(RUN)
    assert home.run() is None
    with pytest.raises(CommandError, match="no running stack"):
        resolve_target()


def test_accounts_can_be_managed_while_nothing_runs(tmp_path: Path) -> None:
    home = DataDir(tmp_path / "d")
    home.create()
    pepper = home.secrets().pepper
    settings = resolve(home.root)
    assert settings.database.url.get_secret_value() == f"sqlite:///{home.root}/accounts.db"
    assert settings.auth.pepper.get_secret_value() == pepper


def test_a_key_without_an_address_and_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="no running stack"):
        resolve_target(key="k")
    with pytest.raises(CommandError, match="no API key"):
        resolve_target(url="http://x")


def test_bad_settings_stay_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_API__PORT", "http")
    with pytest.raises(SettingsError, match="FOREBAY_API__PORT='http'"):
        resolve()


# -- the directory itself -------------------------------------------------------------------------
def test_only_one_process_holds_it(tmp_path: Path) -> None:
    home = DataDir(tmp_path / "d")
    home.create()
    held = home.lock()
    with pytest.raises(DataDirBusyError, match=f"pid {os.getpid()}"):
        home.lock()
    os.close(held)
    os.close(home.lock())


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    home = DataDir(tmp_path / "d")
    home.create()
    assert home.known_secrets() is None
    first = home.secrets()
    assert home.secrets() == first
    assert DataDir(tmp_path / "e").known_secrets() is None
    assert len(first.pepper) >= 32
    home.keep_admin_key(AdminKey(id="key_1", secret="s", digest="d"))
    assert home.admin_key() == AdminKey(id="key_1", secret="s", digest="d")
    home.write_run(RUN)
    files = [path for path in home.root.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"secrets.json", "admin_key.json", "run.json"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert home.root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, content: str) -> None:
    home = DataDir(tmp_path / "d")
    home.create()
    (home.root / "run.json").write_text(content)
    (home.root / "admin_key.json").write_text(content)
    assert home.run() is None
    assert home.admin_key() is None


def test_the_run_file_can_be_read_by_a_script(running: DataDir) -> None:
    document = json.loads((running.root / "run.json").read_text())
    assert document["api"] == RUN.api
    assert document["env"] == RUN.env
