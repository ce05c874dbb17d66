"""A bad setting stops the start with one line; a secret is never shown."""

from __future__ import annotations

import pytest

from config import settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FOREBAY_API__PORT", "http", "valid integer"),
        ("FOREBAY_API__PORT", "70000", "less than or equal to 65535"),
        ("FOREBAY_QUEUE__LEASE_TTL_S", "0", "greater than 0"),
        ("FOREBAY_WORKER__ENGINE", "vllm", "'transformers' or 'simulated'"),
        ("FOREBAY_ENV", "staging", "'development' or 'production'"),
        ("FOREBAY_API__PROT", "1", "not permitted"),
    ],
)
def test_a_bad_value_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(_env_file=None)
    line = str(caught.value)
    assert line.startswith(f"{name}={value!r}: ")
    assert allowed in line
    assert "\n" not in line


def test_a_bad_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_DATABASE__URL", "mysql://root:hunter2@db/forebay")
    with pytest.raises(settings.SettingsError, match="FOREBAY_DATABASE__URL") as caught:
        settings.load(_env_file=None)
    assert "hunter2" not in str(caught.value)
    assert "postgresql+psycopg://" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOREBAY_AUTH__PEPER", "hunter2"),
        ("FOREBAY_REDIS__PASSWORD", "hunter2"),
        ("FOREBAY_REDIS", '"redis://:hunter2@localhost/0"'),
        ("FOREBAY_FLOWER", '{"basic": "admin:hunter2"}'),
    ],
)
def test_a_secret_under_a_wrong_name_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(settings.SettingsError, match=name) as caught:
        settings.load(_env_file=None)
    assert "hunter2" not in str(caught.value)


def test_secrets_hide_in_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_AUTH__PEPPER", "hunter2")
    monkeypatch.setenv("FOREBAY_REDIS__URL", "redis://:hunter2@localhost/0")
    loaded = settings.load(_env_file=None)
    assert loaded.auth.pepper.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(loaded)
    assert "hunter2" not in str(loaded.model_dump())


def test_the_tree_is_frozen() -> None:
    loaded = settings.load(_env_file=None)
    with pytest.raises(ValueError, match="frozen"):
        loaded.api.port = 1  # type: ignore[misc]


def test_a_file_is_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("FOREBAY_API__PORT=9000\nFOREBAY_API__HOST=::1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_API__HOST", "127.0.0.2")
    loaded = settings.load()
    assert (loaded.api.port, loaded.api.host) == (9000, "127.0.0.2")
