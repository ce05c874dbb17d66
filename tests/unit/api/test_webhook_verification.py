"""`verify_webhook` against the reference implementation of Standard Webhooks."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook

from api.client import WebhookError, verify_webhook

SECRET = "whsec_" + base64.b64encode(b"a secret of 24 bytes or so").decode()
OTHER = "whsec_" + base64.b64encode(b"another secret altogether").decode()
BODY = json.dumps({"type": "job.completed", "data": {"text": "grüß"}}, ensure_ascii=False)


def signed(secret: str = SECRET, *, ago_s: float = 0, body: str = BODY) -> dict[str, str]:
    now = datetime.now(UTC) - timedelta(seconds=ago_s)
    return {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(int(now.timestamp())),
        "Webhook-Signature": Webhook(secret).sign("msg_1", now, body),
    }


@pytest.mark.parametrize("payload", [BODY, BODY.encode()])
@pytest.mark.parametrize("secret", [SECRET, SECRET.removeprefix("whsec_"), [OTHER, SECRET]])
def test_what_the_reference_signs_is_accepted(
    payload: str | bytes, secret: str | list[str]
) -> None:
    assert verify_webhook(payload, signed(), secret)["type"] == "job.completed"


def test_one_of_several_signatures_is_enough() -> None:
    headers = signed()
    ours = headers["Webhook-Signature"]
    theirs = signed(OTHER)["Webhook-Signature"]
    headers["Webhook-Signature"] = f"v1a,AAAA {theirs} {ours}"
    assert verify_webhook(BODY, headers, SECRET)
    headers["Webhook-Signature"] = f"v1a,{ours.removeprefix('v1,')} {theirs} v1,? v1"
    with pytest.raises(WebhookError, match="no signature"):
        verify_webhook(BODY, headers, SECRET)


@pytest.mark.parametrize("name", ["Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"])
def test_headers_that_are_missing_or_changed_are_refused(name: str) -> None:
    headers = signed()
    with pytest.raises(WebhookError):
        verify_webhook(BODY, {**headers, name: headers[name] + "1"}, SECRET)
    del headers[name]
    with pytest.raises(WebhookError, match=f"{name.lower()} is missing"):
        verify_webhook(BODY, headers, SECRET)


@pytest.mark.parametrize("ago_s", [400, -400])
def test_another_time_is_refused(ago_s: float) -> None:
    with pytest.raises(WebhookError, match="too far"):
        verify_webhook(BODY, signed(ago_s=ago_s), SECRET)
    assert verify_webhook(BODY, signed(ago_s=ago_s), SECRET, tolerance_s=500)


def test_another_body_or_secret_is_refused() -> None:
    with pytest.raises(WebhookError):
        verify_webhook(BODY + " ", signed(), SECRET)
    with pytest.raises(WebhookError):
        verify_webhook(BODY, signed(), OTHER)
    with pytest.raises(ValueError, match="whsec_"):
        verify_webhook(BODY, signed(), "whsec_!")
    with pytest.raises(WebhookError, match="JSON"):
        verify_webhook("no", signed(body="no"), SECRET)
