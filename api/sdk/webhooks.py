"""Verifying what a webhook endpoint receives (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from api.sdk.errors import WebhookError

_SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with


def verify_webhook(
    payload: bytes | str,
    headers: Mapping[str, str],
    secret: str | Sequence[str],
    *,
    tolerance_s: float = 300,
) -> Any:
    """The JSON of a webhook, once it is certain that it was signed with (one of) the secrets.

    `payload` is the body exactly as it came: parsed and written again it is another one. Header
    names may have any case. A message whose timestamp is further than `tolerance_s` from now may
    be a repeat by somebody who overheard it and is refused. The same `webhook-id` may rightly come
    more than once (at-least-once delivery): remember the ids that were dealt with.
    Raises `WebhookError`; `ValueError` when a secret is not one.
    """
    body = payload.encode() if isinstance(payload, str) else payload
    given = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, timestamp, signatures = (
            given[f"webhook-{name}"] for name in ("id", "timestamp", "signature")
        )
    except KeyError as error:
        raise WebhookError(f"the header {error.args[0]} is missing") from None
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 15):
        raise WebhookError("webhook-timestamp is not a Unix time")
    if abs(time.time() - int(timestamp)) > tolerance_s:
        raise WebhookError("webhook-timestamp is too far from now")
    signed = b"%b.%b.%b" % (message_id.encode(), timestamp.encode(), body)
    secrets = [secret] if isinstance(secret, str) else secret
    expected = [hmac.new(_key(each), signed, hashlib.sha256).digest() for each in secrets]
    for signature in signatures.split():
        version, _, encoded = signature.partition(",")
        # Other versions are for other keys; a sender may add them.
        if version == "v1" and any(
            hmac.compare_digest(_decoded(encoded), digest) for digest in expected
        ):
            break
    else:
        raise WebhookError("no signature fits")
    try:
        return json.loads(body)
    except ValueError:
        raise WebhookError("the body is not JSON") from None


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("a webhook secret is whsec_ and base64")
    return key


def _decoded(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""
