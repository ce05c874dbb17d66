"""The address of a Redis behind Sentinels."""

from __future__ import annotations

import pytest

from broker.app import broker_url, configuration
from broker.connections import connect, connect_async
from config.sentinel import SentinelUrl
from config.settings import Redis, Settings, SettingsError, load


def test_all_its_parts() -> None:
    url = SentinelUrl.parse(
        "rediss+sentinel://me:p%40ss@one,two:26380,[::1]:26381/main/3?sentinel_password=s"
    )
    assert url.sentinels == (("one", 26379), ("two", 26380), ("::1", 26381))
    assert (url.service, url.db, url.tls) == ("main", 3, True)
    assert (url.username, url.password, url.sentinel_password) == ("me", "p@ss", "s")
    assert "p@ss" not in repr(url)


def test_the_least() -> None:
    url = SentinelUrl.parse("redis+sentinel://one/main")
    assert (url.sentinels, url.service, url.db) == ((("one", 26379),), "main", 0)
    assert (url.username, url.password, url.tls) == (None, None, False)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+sentinel://:secret@one:1", "name is missing"),
        ("redis+sentinel://:secret@one:1/main/zero", "must be a number"),
        ("redis+sentinel://:secret@one:port/main", "host or host:port"),
        ("redis+sentinel://:secret@one,,two/main", "host or host:port"),
        ("redis+sentinel://:secret@one/main?dbb=1", "unknown option 'dbb'"),
        ("sentinel://:secret@one/main", "must start with"),
    ],
)
def test_a_bad_one_stops_the_start(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("FOREBAY_REDIS__URL", url)
    with pytest.raises(SettingsError, match=r"FOREBAY_REDIS__URL=\(hidden\)") as refused:
        load(_env_file=None)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("scheme", "tls"), [("redis", False), ("rediss", True)])
def test_what_is_made_of_it(scheme: str, tls: bool) -> None:
    settings = Redis(url=f"{scheme}+sentinel://me:secret@one,two/main/2", max_connections=3)
    for client in (connect(settings), connect_async(settings)):
        pool = client.connection_pool
        assert pool.max_connections == 3
        connection = pool.make_connection()
        assert type(connection).__name__.endswith(
            "PrimarySSLConnection" if tls else "PrimaryConnection"
        )
        assert (connection.db, connection.username, connection.password) == (2, "me", "secret")
    celery = configuration(Settings(redis=settings), frozenset())
    assert celery["broker_url"] == broker_url(f"{scheme}://me:secret@one:26379/2")
    assert "secret" not in repr(celery["broker_transport_options"])
