"""From an `Authorization` header to a principal: in memory, in constant time, without awaiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from api.auth import keys
from api.auth.errors import AuthenticationError, AuthenticationUnavailableError, Reason
from api.auth.principal import Accounts, Credential, Principal
from api.auth.tokens import TokenVerifier
from config.settings import Auth, Settings, SettingsError

#: Nothing longer is a credential; what is too long is refused before it is looked at.
_MAX_LENGTH: Final = 8_192
#: Accepted headers whose digest is remembered; more of them are forgotten all at once.
_REMEMBERED: Final = 10_000
#: A pepper that could be guessed protects nothing.
_MIN_PEPPER_LENGTH: Final = 16


def peppers(settings: Auth) -> dict[int, bytes]:
    """Peppers by version, the current one first.

    Raises `SettingsError` when there is none, or one is too short to protect anything.
    """
    found = {settings.pepper_version: settings.pepper.get_secret_value().encode()}
    previous = settings.previous_pepper.get_secret_value().encode()
    if previous:
        found[settings.pepper_version - 1] = previous
    if any(len(pepper) < _MIN_PEPPER_LENGTH for pepper in found.values()):
        raise SettingsError(
            f"FOREBAY_AUTH__PEPPER=(hidden): needs at least {_MIN_PEPPER_LENGTH} random characters"
            " (python -c 'import secrets; print(secrets.token_urlsafe(32))')"
        )
    return found


class Authenticator:
    """Tells API keys and access tokens apart and checks them against the accounts in memory."""

    def __init__(
        self,
        accounts: Accounts,
        settings: Auth,
        *,
        tokens: TokenVerifier | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._peppers = tuple(peppers(settings).values())
        self._tokens = tokens
        self._clock = clock
        #: Accepted header -> digest of the key in it. A digest never goes stale: whether its key
        #: is still live is looked up at every call.
        self._digests: dict[str, bytes] = {}

    @classmethod
    def from_settings(cls, settings: Settings, accounts: Accounts) -> Authenticator:
        """With access tokens when `jwt` is configured. Raises `SettingsError`."""
        return cls(accounts, settings.auth, tokens=TokenVerifier.from_settings(settings.jwt))

    def authenticate(self, authorization: str | None) -> Principal:
        """The principal behind the value of an `Authorization` header.

        Raises `AuthenticationError` for anything but a good credential, whatever bytes came, and
        `AuthenticationUnavailableError` while accounts were never loaded.
        """
        if not authorization:
            raise AuthenticationError(Reason.MISSING)
        digest = self._digests.get(authorization)
        if digest is not None and (found := self._accounts.credential(digest)) is not None:
            return self._admit(found)
        if len(authorization) > _MAX_LENGTH:
            raise AuthenticationError(Reason.MALFORMED)
        scheme, _, credential = authorization.partition(" ")
        credential = credential.strip(" ")
        if scheme.lower() != "bearer" or not credential:
            raise AuthenticationError(Reason.MALFORMED)
        if keys.has_form(credential):
            return self._admit(self._by_key(credential, authorization))
        if credential.count(".") == 2 and credential.isascii():
            return self._by_token(credential)
        raise AuthenticationError(Reason.MALFORMED)

    def _by_key(self, key: str, authorization: str) -> Credential:
        if not keys.has_checksum(key):
            raise AuthenticationError(Reason.CHECKSUM)
        self._require_accounts()
        for pepper in self._peppers:
            # The table is found by an HMAC that a caller can't steer, so the time that a lookup
            # takes tells nothing about the keys in it.
            digest = keys.digest(key, pepper)
            found = self._accounts.credential(digest)
            if found is not None:
                if len(self._digests) >= _REMEMBERED:
                    self._digests.clear()
                self._digests[authorization] = digest
                return found
        raise AuthenticationError(Reason.UNKNOWN_KEY)

    def _admit(self, found: Credential) -> Principal:
        principal = found.principal
        if self._clock() >= found.expires_at:
            raise AuthenticationError(Reason.EXPIRED_KEY, key_id=principal.key_id)
        self._accounts.used(principal.key_id)
        return principal

    def _by_token(self, token: str) -> Principal:
        if self._tokens is None:
            raise AuthenticationError(Reason.TOKENS_OFF)
        claims = self._tokens.verify(token)
        self._require_accounts()
        account = self._accounts.account(claims.tenant)
        if account is None:
            raise AuthenticationError(Reason.UNKNOWN_TENANT)
        return Principal(
            tenant=account.id,
            tenant_name=account.name,
            key_id=f"client:{claims.client_id}",
            scopes=claims.scopes,
            policy=account.policy,
        )

    def _require_accounts(self) -> None:
        if not self._accounts.ready:
            raise AuthenticationUnavailableError("accounts have not been loaded yet")
