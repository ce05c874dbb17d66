"""Why a credential was refused, in words that hold no part of it."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Reason code for logs and counters; the caller of the API never learns it."""

    #: No `Authorization` header.
    MISSING = "missing"
    #: Not `Bearer <credential>`, or neither an API key nor a token by its form.
    MALFORMED = "malformed"
    #: The form of an API key, but its checksum is wrong: a typo or a guess.
    CHECKSUM = "checksum"
    #: No live key has this digest: never made, revoked, or its tenant is disabled.
    UNKNOWN_KEY = "unknown_key"
    EXPIRED_KEY = "expired_key"
    #: An access token came, but no issuer is configured.
    TOKENS_OFF = "tokens_off"
    #: Header of a token: wrong `typ`, `alg` or `kid`, a `crit`, or a key of its own.
    TOKEN_HEADER = "token_header"  # noqa: S105 — a reason, not a password
    TOKEN_SIGNATURE = "token_signature"  # noqa: S105
    #: Wrong issuer or audience, a required claim missing or of the wrong type, not yet valid.
    TOKEN_CLAIMS = "token_claims"  # noqa: S105
    TOKEN_EXPIRED = "token_expired"  # noqa: S105
    #: The tenant named by a token doesn't exist or is disabled.
    UNKNOWN_TENANT = "unknown_tenant"


class AuthenticationError(Exception):
    """The credential is refused (401). Says why by code; holds nothing of the credential."""

    def __init__(self, reason: Reason, *, key_id: str | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        #: Id of the key at fault, when it is known (it is no secret).
        self.key_id = key_id


class AuthenticationUnavailableError(Exception):
    """Accounts were never loaded, so nobody can be told apart yet (503, not 401)."""
