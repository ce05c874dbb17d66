"""Secrets and signatures as Standard Webhooks 1.0 has them (github.com/standard-webhooks).

A secret is derived from one key of the installation, the name of what it signs for and a version
that counts rotations: nothing secret is stored, a copy of database and Redis signs nothing, and
there is no secret to be shown a second time by mistake.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from config.settings import Settings, SettingsError

PREFIX = "whsec_"


def installation_key(settings: Settings) -> bytes:
    """The key of `webhooks.key`, else one made from the pepper. Raises `SettingsError`."""
    if own := settings.webhooks.key.get_secret_value():
        return hashlib.sha256(own.encode()).digest()
    if pepper := settings.auth.pepper.get_secret_value():
        return hmac.digest(pepper.encode(), b"forebay webhooks", "sha256")
    raise SettingsError("FOREBAY_WEBHOOKS__KEY=(hidden): must be set where the pepper isn't")


def job_signer(tenant: str) -> str:
    """What signs the webhooks of a tenant's single jobs."""
    return f"jobs:{tenant}"


def secret(key: bytes, signer: str, version: int) -> bytes:
    """32 bytes; `signer` is an endpoint's id or a `job_signer`."""
    return hmac.digest(key, f"{signer}\0{version}".encode(), "sha256")


def shown(value: bytes) -> str:
    """A secret as its owner gets it."""
    return PREFIX + base64.b64encode(value).decode()


def sign(secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one signature per secret, separated by spaces."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(each, content, "sha256")).decode() for each in secrets
    )


def headers(
    secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers of one attempt; `timestamp` is its time (Unix seconds)."""
    return {
        "content-type": "application/json",
        "user-agent": "forebay-webhooks/1",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secrets, message_id, timestamp, body),
    }
