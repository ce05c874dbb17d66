"""Where webhooks may go, how they are signed, when they are tried again."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
import standardwebhooks
from pydantic import SecretStr

from broker.webhooks import events, signing
from broker.webhooks.endpoints import (
    EVENT_TYPES,
    TEST_EVENT,
    Endpoint,
    Health,
    JobWebhook,
    Signing,
)
from broker.webhooks.outbox import OutboxEvent
from broker.webhooks.schedule import delay_s, retry_after
from broker.webhooks.urls import UrlError, check_url, is_allowed, origin
from config.settings import Auth, Settings, SettingsError, Webhooks, load

GOOD = (
    "https://example.com",
    "https://example.com/hook?a=1&b=%20",
    "https://hooks.example.co.uk:8443/x",
    "https://xn--bcher-kva.example/hook",
    "https://8.8.8.8/hook",
    "https://[2606:4700::1111]/hook",
)
BAD = (
    "",
    "example.com/hook",
    "http://example.com/hook",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "https://",
    "https:///hook",
    "https:/example.com",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://example.com@10.0.0.1/",
    "https://example.com#@10.0.0.1/",
    "https://example.com/#fragment",
    "https://example.com\\@10.0.0.1/",
    "https://example.com/\r\nHost: inside",
    "https://exa mple.com/",
    "https://example.com:0/",
    "https://example.com:65536/",
    "https://example.com:80:80/",
    "https://bücher.example/",
    "https://①②⑦.⓪.⓪.①/",
    "https://%31%32%37.0.0.1/",
    "https://localhost/",
    "https://LOCALHOST/",
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://127.0.0.0x1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://10.0.0.1/",
    "https://172.16.5.4/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://168.63.129.16/",
    "https://0.0.0.0/",
    "https://255.255.255.255/",
    "https://224.0.0.1/",
    "https://[::1]/",
    "https://[::]/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[::ffff:8.8.8.8]/",
    "https://[64:ff9b::a00:1]/",
    "https://[64:ff9b:1::1]/",
    "https://[2002:a00:1::]/",
    "https://[2001:0:53aa:64c::]/",
    "https://[2001:db8::1]/",
    "https://[ff02::1]/",
    "https://[127.0.0.1]/",
    "https://" + "a" * 2050 + ".example/",
)


@pytest.mark.parametrize("url", GOOD)
def test_urls_that_may_be_sent_to(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("url", BAD)
def test_urls_that_may_not(url: str) -> None:
    with pytest.raises(UrlError) as caught:
        check_url(url)
    assert not url or url not in str(caught.value)


def test_what_development_opens() -> None:
    check_url("http://example.com/", plain=True)
    for url in ("http://127.0.0.1:8080/x", "http://[::1]:8080/", "http://localhost:1/"):
        check_url(url, plain=True, loopback=True)
    for url in ("http://127.0.0.2/", "http://10.0.0.1/", "http://169.254.169.254/"):
        with pytest.raises(UrlError):
            check_url(url, plain=True, loopback=True)


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("8.8.8.8", True),
        ("203.0.114.1", True),
        ("2a00:1450:4001::1", True),
        ("203.0.113.1", False),
        ("198.18.0.1", False),
        ("198.51.100.1", False),
        ("192.0.0.192", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("100.100.100.200", False),
        ("240.0.0.1", False),
        ("::ffff:8.8.8.8", False),
        ("::8.8.8.8", False),
        ("64:ff9b::808:808", False),
        ("2001:20::1", False),
        ("3fff::1", False),
        ("fec0::1", False),
        ("100::1", False),
    ],
)
def test_addresses(address: str, allowed: bool) -> None:
    assert is_allowed(ip_address(address)) is allowed


def test_single_webhooks_are_bounded_by_origin() -> None:
    assert origin("https://Example.com/a") == origin("https://example.com/b?c")
    assert origin("https://example.com:444/a") != origin("https://example.com/a")


# -- signing --------------------------------------------------------------------------------------
def test_the_vector_of_the_specification() -> None:
    # From the Standard Webhooks specification's own libraries.
    secret = signing.PREFIX + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    import base64

    key = base64.b64decode(secret.removeprefix(signing.PREFIX))
    made = signing.sign([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body)
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets_differ_by_name_and_version_and_not_by_chance() -> None:
    key = b"k"
    made = {signing.secret(key, name, version) for name in ("a", "b") for version in (1, 2)}
    assert len(made) == 4
    assert signing.secret(key, "a", 1) == signing.secret(key, "a", 1)
    assert all(len(each) == 32 for each in made)


def test_the_published_package_takes_the_headers() -> None:
    secret = signing.secret(b"k", "wep_1", 1)
    now = int(datetime.now(UTC).timestamp())
    headers = signing.headers([secret], "evt_1", now, '{"ü":1}'.encode())
    webhook = standardwebhooks.Webhook(signing.shown(secret))
    assert webhook.verify('{"ü":1}'.encode(), headers) == {"ü": 1}


def test_where_the_key_comes_from() -> None:
    def settings(key: str, pepper: str) -> Settings:
        return load(
            _env_file=None,
            webhooks=Webhooks(key=SecretStr(key)),
            auth=Auth(pepper=SecretStr(pepper)),
        )

    own = signing.installation_key(settings("key", "pepper"))
    assert own == signing.installation_key(settings("key", "other"))
    assert own != signing.installation_key(settings("", "pepper"))
    with pytest.raises(SettingsError, match="FOREBAY_WEBHOOKS__KEY"):
        signing.installation_key(settings("", ""))


def test_versions_that_sign() -> None:
    assert Signing(version=1, previous_until_ms=99).versions(1) == (1,)
    assert Signing(version=3, previous_until_ms=99).versions(98) == (3, 2)
    assert Signing(version=3, previous_until_ms=99).versions(99) == (3,)


# -- schedule -------------------------------------------------------------------------------------
def test_delays_scatter_around_the_plan() -> None:
    plan = Webhooks().retry_plan
    assert plan == (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    assert delay_s(plan, 1, draw=lambda: 0.5) == 5
    assert delay_s(plan, 2, draw=lambda: 0.0) == pytest.approx(270)
    assert delay_s(plan, 2, draw=lambda: 1.0) == pytest.approx(330)
    assert delay_s(plan, 9) is not None
    assert delay_s(plan, 10) is None


def test_retry_after_only_makes_it_longer_and_has_a_bound() -> None:
    plan = (0.0, 100.0)
    assert delay_s(plan, 1, retry_after_s=500, draw=lambda: 0.5) == 500
    assert delay_s(plan, 1, retry_after_s=1, draw=lambda: 0.5) == 100
    assert delay_s(plan, 1, retry_after_s=1e9, draw=lambda: 0.5) == 86_400


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120),
        (" 7 ", 7),
        ("-1", None),
        ("soon", None),
        ("9" * 400, 999_999_999),
        ("Tue, 24 Nov 2026 12:00:30 GMT", 30),
        ("Tue, 24 Nov 2026 11:00:00 GMT", 0),
    ],
)
def test_retry_after_headers(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, datetime(2026, 11, 24, 12, tzinfo=UTC)) == seconds


@pytest.mark.parametrize("plan", ["", "a", "-1", "0,5", "700000", "1 " * 51])
def test_a_plan_that_is_none_stops_the_start(plan: str) -> None:
    with pytest.raises(SettingsError, match="FOREBAY_WEBHOOKS__RETRY_S"):
        load(_env_file=None, webhooks={"retry_s": plan})


# -- records --------------------------------------------------------------------------------------
def test_records_come_back_as_they_were() -> None:
    endpoint = Endpoint(id="wep_1", url="https://a.example", event_types=("job.failed",))
    assert Endpoint.from_json(endpoint.to_json()) == endpoint
    own = JobWebhook(url="https://a.example", event_types=("job.failed",), include_output=True)
    assert JobWebhook.from_json(own.to_json()) == own
    assert Signing.from_json(Signing(version=4).to_json()) == Signing(version=4)
    assert Signing.from_json(None).version == 0
    assert Health.from_hash({b"disabled_ms": b"7", b"reason": b"gone"}).reason == "gone"


def test_an_events_id_is_that_of_its_job_and_life() -> None:
    event = OutboxEvent(type="job.failed", tenant="t", ms=1, job="job_abc", seq=4)
    assert event.id == "evt_abc_4"


@pytest.mark.parametrize("event_type", [*EVENT_TYPES, TEST_EVENT])
def test_samples_look_like_their_events(event_type: str) -> None:
    data = events.sample_data(event_type, "wep_1")
    kind = event_type.partition(".")[0]
    names = {"job": "job_", "response": "resp_", "batch": "batch_", "webhook_endpoint": "wep_"}
    assert data["id"].startswith(names[kind])
    assert ("object" in data) == (kind in ("job", "webhook_endpoint"))
