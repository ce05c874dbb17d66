"""JWT access tokens as RFC 9068 profiles them, checked as RFC 8725 advises.

The algorithm is a property of the configured key, never of the token; a header that brings or
points to a key of its own (`jwk`, `jku`, `x5u`, `x5c`) or marks anything critical is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from api.auth.errors import AuthenticationError, Reason
from api.auth.principal import SCOPES
from config.settings import Jwt, SettingsError

_TYPES: Final = frozenset({"at+jwt", "application/at+jwt"})
_REQUIRED: Final = ["iss", "exp", "aud", "sub", "client_id", "iat", "jti", "tenant"]
_REFUSED_HEADERS: Final = frozenset({"crit", "b64", "jku", "jwk", "x5u", "x5c"})
#: Ids that travel into records and logs: printable ASCII, bounded.
_ID: Final = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
_MIN_RSA_BITS: Final = 2048

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What a verified token says."""

    subject: str
    client_id: str
    token_id: str
    #: Id of the tenant, from the claim `tenant`.
    tenant: str
    #: Scopes of the claim `scope` that mean something here.
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _VerifyingKey:
    key: PublicKey
    algorithm: str


class TokenVerifier:
    """Checks access tokens of one issuer with its public keys, read once at the start."""

    def __init__(self, settings: Jwt, keys: Mapping[str, _VerifyingKey]) -> None:
        self._settings = settings
        self._keys = keys
        #: A single key serves tokens that name no `kid`.
        self._only = next(iter(keys.values())) if len(keys) == 1 else None

    @classmethod
    def from_settings(cls, settings: Jwt) -> TokenVerifier | None:
        """None when tokens are off. Raises `SettingsError` for a key that can't be used."""
        if not settings.enabled:
            return None
        if settings.public_key:
            keys = {"": _from_pem(settings.public_key)}
        else:
            keys = _from_jwks(Path(settings.jwks_file))
        return cls(settings, keys)

    def verify(self, token: str) -> Claims:
        """The claims of a good token; `AuthenticationError` for any other text."""
        key = self._key_for(token)
        try:
            payload: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=self._settings.leeway_s,
                options={"require": _REQUIRED},
            )
        except jwt.ExpiredSignatureError:
            raise AuthenticationError(Reason.TOKEN_EXPIRED) from None
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            raise AuthenticationError(Reason.TOKEN_SIGNATURE) from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
            raise AuthenticationError(Reason.TOKEN_CLAIMS) from None
        return _claims(payload)

    def _key_for(self, token: str) -> _VerifyingKey:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            raise AuthenticationError(Reason.MALFORMED) from None
        type_ = header.get("typ")
        if not isinstance(type_, str) or type_.lower() not in _TYPES:
            raise AuthenticationError(Reason.TOKEN_HEADER)
        if _REFUSED_HEADERS & header.keys():
            raise AuthenticationError(Reason.TOKEN_HEADER)
        kid = header.get("kid")
        # A PEM key has no name, so whatever `kid` its issuer writes is right.
        key = self._only if kid is None or "" in self._keys else self._keys.get(kid)
        if key is None or header.get("alg") != key.algorithm:
            raise AuthenticationError(Reason.TOKEN_HEADER)
        return key


def _claims(payload: dict[str, Any]) -> Claims:
    for name in ("client_id", "jti", "tenant"):
        value = payload[name]
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise AuthenticationError(Reason.TOKEN_CLAIMS)
    for name in ("exp", "iat"):
        # The library also takes numbers written as text, and booleans.
        if isinstance(payload[name], bool) or not isinstance(payload[name], int | float):
            raise AuthenticationError(Reason.TOKEN_CLAIMS)
    scope = payload.get("scope", "")
    if not payload["sub"] or not isinstance(scope, str):
        raise AuthenticationError(Reason.TOKEN_CLAIMS)
    return Claims(
        subject=payload["sub"],
        client_id=payload["client_id"],
        token_id=payload["jti"],
        tenant=payload["tenant"],
        scopes=SCOPES & set(scope.split(" ")),
    )


def _from_pem(text: str) -> _VerifyingKey:
    try:
        key = load_pem_public_key(text.replace("\\n", "\n").encode())
        return _verifying(key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"FOREBAY_JWT__PUBLIC_KEY: {_line(error)}") from None


def _from_jwks(path: Path) -> dict[str, _VerifyingKey]:
    try:
        found = orjson.loads(path.read_bytes())["keys"]
        keys = {}
        for entry in found:
            if entry.get("use", "sig") != "sig":
                continue
            name = entry.get("kid")
            if not isinstance(name, str) or not name or name in keys:
                raise ValueError("every key needs a kid of its own")
            if entry.get("kty") == "oct" or "d" in entry:
                raise ValueError("only public keys belong here")
            keys[name] = _verifying(jwt.PyJWK.from_dict(entry).key)
        if not keys:
            raise ValueError("holds no key for signatures")
    except OSError as error:
        raise SettingsError(f"FOREBAY_JWT__JWKS_FILE={str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise SettingsError(f"FOREBAY_JWT__JWKS_FILE={str(path)!r}: {_line(error)}") from None
    return keys


def _verifying(key: object) -> _VerifyingKey:
    """Bind the key to the one algorithm it is used with."""
    if isinstance(key, RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise ValueError(f"an RSA key needs at least {_MIN_RSA_BITS} bits")
        return _VerifyingKey(key, "RS256")
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return _VerifyingKey(key, "ES256")
    if isinstance(key, Ed25519PublicKey):
        return _VerifyingKey(key, "EdDSA")
    raise ValueError("needs a public RSA, P-256 or Ed25519 key")


def _line(error: Exception) -> str:
    text = str(error).split("\n", 1)[0][:120]
    return f"can't be used ({text or type(error).__name__})"
