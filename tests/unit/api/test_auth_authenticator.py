"""Authentication of API keys: what is accepted, what is refused, and what a refusal tells."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from api.auth import keys
from api.auth.authenticator import Authenticator
from api.auth.errors import AuthenticationError, AuthenticationUnavailableError, Reason
from api.auth.principal import Account, Credential, Principal
from config.settings import Auth, SettingsError

PEPPER = "pepper-of-the-tests"
SETTINGS = Auth(pepper=SecretStr(PEPPER))
PRINCIPAL = Principal(
    tenant="ten_1", tenant_name="acme", key_id="key_1", scopes=frozenset({"jobs"})
)


class FakeAccounts:
    """A directory that counts how often it is asked."""

    def __init__(self) -> None:
        self.ready = True
        self.by_digest: dict[bytes, Credential] = {}
        self.lookups = 0
        self.uses: list[str] = []

    def add(self, key: str, *, pepper: str = PEPPER, expires_at: float = math.inf) -> None:
        credential = Credential(principal=PRINCIPAL, expires_at=expires_at)
        self.by_digest[keys.digest(key, pepper.encode())] = credential

    def credential(self, digest: bytes) -> Credential | None:
        self.lookups += 1
        return self.by_digest.get(digest)

    def account(self, tenant_id: str) -> Account | None:
        self.lookups += 1
        return None

    def used(self, key_id: str) -> None:
        self.uses.append(key_id)


@pytest.fixture
def accounts() -> FakeAccounts:
    return FakeAccounts()


def refusal(accounts: FakeAccounts, authorization: str | None) -> AuthenticationError:
    with pytest.raises(AuthenticationError) as caught:
        Authenticator(accounts, SETTINGS).authenticate(authorization)
    return caught.value


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_live_key_gives_its_principal(accounts: FakeAccounts, scheme: str) -> None:
    key = keys.generate("live").text
    accounts.add(key)
    assert Authenticator(accounts, SETTINGS).authenticate(f"{scheme} {key}") is PRINCIPAL
    assert accounts.uses == ["key_1"]


def test_an_unknown_key_is_refused(accounts: FakeAccounts) -> None:
    accounts.add(keys.generate("live").text)
    key = keys.generate("live").text
    assert refusal(accounts, f"Bearer {key}").reason is Reason.UNKNOWN_KEY
    assert accounts.uses == []


def test_a_bad_checksum_is_refused_without_a_lookup(accounts: FakeAccounts) -> None:
    key = keys.generate("live").text
    accounts.add(key)
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert refusal(accounts, f"Bearer {wrong}").reason is Reason.CHECKSUM
    assert accounts.lookups == 0


def test_a_key_is_refused_from_the_second_it_expires(accounts: FakeAccounts) -> None:
    key = keys.generate("live").text
    accounts.add(key, expires_at=1000.0)
    now = 999.9
    authenticator = Authenticator(accounts, SETTINGS, clock=lambda: now)
    assert authenticator.authenticate(f"Bearer {key}") is PRINCIPAL
    now = 1000.0
    with pytest.raises(AuthenticationError) as caught:
        authenticator.authenticate(f"Bearer {key}")
    assert caught.value.reason is Reason.EXPIRED_KEY
    assert caught.value.key_id == "key_1"


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        (None, Reason.MISSING),
        ("", Reason.MISSING),
        ("Bearer", Reason.MALFORMED),
        ("Bearer ", Reason.MALFORMED),
        ("Basic dXNlcjpwYXNz", Reason.MALFORMED),
        ("Bearer ' OR '1'='1", Reason.MALFORMED),
        ("Bearer \x00\x00", Reason.MALFORMED),
        ("Bearer fb_live_" + "\x00" * 38, Reason.MALFORMED),
        ("Bearer " + "٣.٣.٣", Reason.MALFORMED),
        ("Bearer \udc80", Reason.MALFORMED),
        ("Bearer " + "A" * 2**20, Reason.MALFORMED),
        ("B" * 2**20, Reason.MALFORMED),
        ("Bearer " + "." * 2**20, Reason.MALFORMED),
        ("Bearer a.b.c", Reason.TOKENS_OFF),
    ],
)
def test_odd_headers_are_refused(
    accounts: FakeAccounts, authorization: str | None, reason: Reason
) -> None:
    assert refusal(accounts, authorization).reason is reason
    assert accounts.lookups == 0


@given(st.text())
@example("Bearer fb_live_" + "a" * 38)
def test_no_text_gets_through_or_breaks_anything(text: str) -> None:
    authenticator = Authenticator(FakeAccounts(), SETTINGS)
    for authorization in (text, f"Bearer {text}", f"Bearer fb_live_{text}"):
        with pytest.raises(AuthenticationError):
            authenticator.authenticate(authorization)


def test_a_huge_header_takes_no_longer_than_a_wrong_key(accounts: FakeAccounts) -> None:
    authenticator = Authenticator(accounts, SETTINGS)

    def best_s(authorization: str) -> float:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            with pytest.raises(AuthenticationError):
                authenticator.authenticate(authorization)
            times.append(time.perf_counter() - began)
        return min(times)

    wrong = best_s("Bearer " + keys.generate("live").text)
    # Reading 1 MB even once takes ten times as long as this allows.
    assert best_s("Bearer " + "a" * 2**20) < wrong + 20e-6


def test_a_refusal_holds_nothing_of_the_credential(accounts: FakeAccounts) -> None:
    key = keys.generate("live").text
    for credential in (key, key[:-1] + "?", "eyJhbGciOiJub25lIn0.e30."):
        error = refusal(accounts, f"Bearer {credential}")
        shown = f"{error!r} {error} {error.__cause__!r} {vars(error)}"
        assert credential[8:20] not in shown


def test_without_loaded_accounts_nobody_is_refused_as_unknown(accounts: FakeAccounts) -> None:
    accounts.ready = False
    authenticator = Authenticator(accounts, SETTINGS)
    with pytest.raises(AuthenticationUnavailableError):
        authenticator.authenticate("Bearer " + keys.generate("live").text)


def test_the_previous_pepper_still_counts_when_given(accounts: FakeAccounts) -> None:
    key = keys.generate("live").text
    accounts.add(key, pepper="pepper-before-this")
    header = f"Bearer {key}"
    assert refusal(accounts, header).reason is Reason.UNKNOWN_KEY
    rotated = Auth(
        pepper=SecretStr(PEPPER),
        pepper_version=2,
        previous_pepper=SecretStr("pepper-before-this"),
    )
    assert Authenticator(accounts, rotated).authenticate(header) is PRINCIPAL


@pytest.mark.parametrize("pepper", ["", "short"])
def test_a_missing_or_short_pepper_stops_the_start(accounts: FakeAccounts, pepper: str) -> None:
    with pytest.raises(SettingsError, match="FOREBAY_AUTH__PEPPER") as caught:
        Authenticator(accounts, Auth(pepper=SecretStr(pepper)))
    assert not pepper or pepper not in str(caught.value)


def test_scopes_are_what_was_granted() -> None:
    assert PRINCIPAL.has("jobs")
    assert not PRINCIPAL.has("admin")
