"""What calls of the SDK raise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """The call failed for good; the message is one line, fit to be shown."""


class ConnectionFailedError(ClientError):
    """The API can't be reached."""


class ApiError(ClientError):
    """The API refused; fields as in its error body (docs/errors.md)."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(error.get("code") or "")
        self.param = error.get("param")
        self.request_id = error.get("request_id")
        message = str(error.get("message") or "no message")
        where = f" ({self.param})" if self.param else ""
        super().__init__(f"{status} {self.code}: {message}{where}".replace(" : ", ": "))


class WebhookError(ClientError):
    """A webhook is not from who it should be from, or not from now."""
