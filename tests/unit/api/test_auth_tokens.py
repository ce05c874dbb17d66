"""Access tokens: RFC 9068's form is required, RFC 8725's attacks are refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from api.auth.authenticator import Authenticator
from api.auth.errors import AuthenticationError, Reason
from api.auth.principal import Account, Credential
from api.auth.tokens import TokenVerifier
from broker.policies import TenantPolicy
from config.settings import Auth, Jwt, SettingsError, load

ISSUER, AUDIENCE = "https://issuer.example", "https://forebay.example"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
STRANGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SIGNERS: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def pem(private: Any) -> str:
    encoded: bytes = private.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    return encoded.decode()


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    full = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": now + 300,
        "iat": now,
        "sub": "user-1",
        "client_id": "app-1",
        "jti": "token-1",
        "tenant": "ten_1",
        "scope": "jobs openid",
    }
    return {name: value for name, value in (full | changes).items() if value is not ...}


def token(payload: dict[str, Any] | None = None, *, headers: dict[str, Any] | None = None) -> str:
    """Signed by hand: the library refuses to make what a test wants refused."""
    return signed({"alg": "RS256", "typ": "at+jwt"} | (headers or {}), payload or claims())


def signed(header: dict[str, Any], payload: dict[str, Any], *, by: Any = RSA) -> str:
    text = f"{part(header)}.{part(payload)}"
    return f"{text}.{part(by.sign(text.encode(), PKCS1v15(), SHA256()))}"


def verifier(key: str | None = None) -> TokenVerifier:
    made = TokenVerifier.from_settings(
        Jwt(issuer=ISSUER, audience=AUDIENCE, public_key=key or pem(RSA), leeway_s=0)
    )
    assert made is not None
    return made


def reason(text: str) -> Reason:
    with pytest.raises(AuthenticationError) as caught:
        verifier().verify(text)
    return caught.value.reason


def part(value: bytes | dict[str, Any]) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_good_token_gives_its_claims(algorithm: str) -> None:
    private = SIGNERS[algorithm]
    text = jwt.encode(claims(), private, algorithm=algorithm, headers={"typ": "at+jwt"})
    found = verifier(pem(private)).verify(text)
    assert (found.tenant, found.subject, found.client_id) == ("ten_1", "user-1", "app-1")
    assert found.scopes == {"jobs"}


def test_the_long_media_type_and_a_list_of_audiences_are_fine() -> None:
    text = token(claims(aud=["other", AUDIENCE]), headers={"typ": "application/at+JWT"})
    assert verifier().verify(text).token_id == "token-1"


@pytest.mark.parametrize("typ", ["JWT", "jwt", "", None, 7])
def test_another_typ_is_refused(typ: object) -> None:
    assert reason(signed({"alg": "RS256", "typ": typ}, claims())) is Reason.TOKEN_HEADER


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE"])
@pytest.mark.parametrize("signature", ["", "AAAA"])
def test_alg_none_is_refused(alg: str, signature: str) -> None:
    text = f"{part({'alg': alg, 'typ': 'at+jwt'})}.{part(claims())}.{signature}"
    assert reason(text) in {Reason.TOKEN_HEADER, Reason.MALFORMED}


@pytest.mark.parametrize("alg", ["HS256", "HS384", "RS512", "PS256", "ES256"])
def test_an_algorithm_the_key_is_not_for_is_refused(alg: str) -> None:
    text = f"{part({'alg': alg, 'typ': 'at+jwt'})}.{part(claims())}"
    # The attack of RFC 8725 2.1: the public key, which everybody has, used as an HMAC secret.
    mac = hmac.digest(pem(RSA).encode(), text.encode(), hashlib.sha256)
    assert reason(f"{text}.{part(mac)}") is Reason.TOKEN_HEADER


@pytest.mark.parametrize(
    "header",
    [
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert.pem"},
        {"jwk": {"kty": "oct", "k": "AAAA"}},
        {"x5c": ["AAAA"]},
        {"crit": ["exp"]},
        {"crit": ["made-up"], "made-up": True},
    ],
    ids=lambda header: next(iter(header)),
)
@pytest.mark.parametrize("private", [RSA, STRANGER], ids=["issuer", "stranger"])
def test_a_header_with_a_key_of_its_own_or_a_crit_is_refused(
    header: dict[str, Any], private: Any
) -> None:
    text = signed({"alg": "RS256", "typ": "at+jwt"} | header, claims(), by=private)
    assert reason(text) in {Reason.TOKEN_HEADER, Reason.MALFORMED}


def test_a_strangers_signature_is_refused() -> None:
    text = signed({"alg": "RS256", "typ": "at+jwt"}, claims(), by=STRANGER)
    assert reason(text) is Reason.TOKEN_SIGNATURE


def test_changed_claims_are_refused() -> None:
    header, _, signature = token().split(".")
    text = f"{header}.{part(claims(tenant='ten_other'))}.{signature}"
    assert reason(text) is Reason.TOKEN_SIGNATURE


@pytest.mark.parametrize("name", ["iss", "exp", "aud", "sub", "client_id", "iat", "jti", "tenant"])
@pytest.mark.parametrize("value", [..., None, [], {}, True, ""], ids=str)
def test_each_claim_is_required_and_typed(name: str, value: object) -> None:
    text = token(claims(**{name: value}))
    assert reason(text) in {Reason.TOKEN_CLAIMS, Reason.TOKEN_EXPIRED}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"iss": ISSUER + "/"}, Reason.TOKEN_CLAIMS),
        ({"iss": "https://issuer"}, Reason.TOKEN_CLAIMS),
        ({"aud": "https://other.example"}, Reason.TOKEN_CLAIMS),
        ({"aud": ["https://other.example"]}, Reason.TOKEN_CLAIMS),
        ({"exp": 1_000_000_000}, Reason.TOKEN_EXPIRED),
        ({"exp": "9999999999"}, Reason.TOKEN_CLAIMS),
        ({"exp": "soon"}, Reason.TOKEN_CLAIMS),
        ({"exp": float("inf")}, Reason.TOKEN_CLAIMS),
        ({"nbf": 9_999_999_999}, Reason.TOKEN_CLAIMS),
        ({"iat": 9_999_999_999}, Reason.TOKEN_CLAIMS),
        ({"client_id": "a" * 129}, Reason.TOKEN_CLAIMS),
        ({"client_id": "line\nbreak"}, Reason.TOKEN_CLAIMS),
        ({"tenant": "ten_1\x00"}, Reason.TOKEN_CLAIMS),
        ({"scope": ["jobs"]}, Reason.TOKEN_CLAIMS),
    ],
    ids=str,
)
def test_wrong_claims_are_refused(changes: dict[str, Any], expected: Reason) -> None:
    assert reason(token(claims(**changes))) is expected


def test_without_scope_nothing_is_allowed() -> None:
    assert verifier().verify(token(claims(scope=...))).scopes == frozenset()


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_no_text_breaks_the_verifier(text: str) -> None:
    for candidate in (text, f"{text}.{text}.{text}", f"{part(text.encode())}.e30.AAAA"):
        with pytest.raises(AuthenticationError):
            verifier().verify(candidate)


def test_deeply_nested_json_is_refused() -> None:
    assert reason(f"{part(b'[' * 4000)}.e30.AAAA") is Reason.MALFORMED


# -- through the authenticator --------------------------------------------------------------------
class OneTenant:
    ready = True

    def credential(self, digest: bytes) -> Credential | None:
        return None

    def account(self, tenant_id: str) -> Account | None:
        known = Account(id="ten_1", name="acme", policy=TenantPolicy(weight=2))
        return known if tenant_id == "ten_1" else None

    def used(self, key_id: str) -> None:
        raise AssertionError("a token is no key")


def authenticator() -> Authenticator:
    return Authenticator(OneTenant(), Auth(pepper=SecretStr("p" * 16)), tokens=verifier())


def test_a_token_gives_the_principal_of_its_tenant() -> None:
    principal = authenticator().authenticate(f"Bearer {token()}")
    assert (principal.tenant, principal.tenant_name) == ("ten_1", "acme")
    assert principal.key_id == "client:app-1"
    assert principal.policy.weight == 2
    assert principal.has("jobs")
    assert not principal.has("admin")


def test_a_token_of_an_unknown_tenant_is_refused() -> None:
    with pytest.raises(AuthenticationError) as caught:
        authenticator().authenticate(f"Bearer {token(claims(tenant='ten_2'))}")
    assert caught.value.reason is Reason.UNKNOWN_TENANT


# -- configuration --------------------------------------------------------------------------------
def jwks(tmp_path: Path, *entries: dict[str, Any]) -> Jwt:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": list(entries)}))
    return Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_file=str(path))


def public_jwk(private: Any, kid: str | None) -> dict[str, Any]:
    algorithm: Any = jwt.algorithms.get_default_algorithms()[
        next(name for name, key in SIGNERS.items() if type(key) is type(private))
    ]
    entry: dict[str, Any] = json.loads(algorithm.to_jwk(private.public_key()))
    return entry | {"kid": kid} if kid else entry


def test_keys_of_a_jwks_file_are_chosen_by_kid(tmp_path: Path) -> None:
    made = TokenVerifier.from_settings(
        jwks(tmp_path, public_jwk(RSA, "a"), public_jwk(EC, "b"), public_jwk(STRANGER, "c"))
    )
    assert made is not None
    assert made.verify(token(headers={"kid": "a"})).tenant == "ten_1"
    for headers in ({"kid": "b"}, {"kid": "c"}, {"kid": "unknown"}, {}):
        with pytest.raises(AuthenticationError):
            made.verify(token(headers=headers))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([], "holds no key"),
        ([{"kty": "oct", "k": "AAAA", "kid": "a"}], "only public keys"),
        ([public_jwk(RSA, None)], "kid"),
        ([public_jwk(RSA, "a"), public_jwk(EC, "a")], "kid"),
        ([{"kty": "made-up", "kid": "a"}], "can't be used"),
        (["text"], "can't be used"),
    ],
)
def test_a_jwks_file_that_can_not_be_used_stops_the_start(
    tmp_path: Path, entries: list[Any], why: str
) -> None:
    with pytest.raises(SettingsError, match=why) as caught:
        TokenVerifier.from_settings(jwks(tmp_path, *entries))
    assert "FOREBAY_JWT__JWKS_FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "no key",
        pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
        pem(ec.generate_private_key(ec.SECP384R1())),
    ],
    ids=["text", "short RSA", "P-384"],
)
def test_a_public_key_that_can_not_be_used_stops_the_start(key: str) -> None:
    with pytest.raises(SettingsError, match="FOREBAY_JWT__PUBLIC_KEY"):
        verifier(key)


def test_a_missing_jwks_file_stops_the_start(tmp_path: Path) -> None:
    settings = Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_file=str(tmp_path / "none.json"))
    with pytest.raises(SettingsError, match="No such file"):
        TokenVerifier.from_settings(settings)


def test_line_breaks_of_a_pem_may_be_escaped() -> None:
    made = verifier(pem(RSA).replace("\n", "\\n"))
    assert made.verify(token()).tenant == "ten_1"


def test_tokens_are_off_by_default() -> None:
    assert TokenVerifier.from_settings(Jwt()) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"ISSUER": ISSUER},
        {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE},
        {"PUBLIC_KEY": "x"},
        {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "PUBLIC_KEY": "x", "JWKS_FILE": "y"},
    ],
)
def test_half_a_configuration_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"FOREBAY_JWT__{name}", value)
    with pytest.raises(SettingsError, match="FOREBAY_JWT"):
        load()
