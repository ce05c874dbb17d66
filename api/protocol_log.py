"""aiohttp's own log, without what callers sent.

Its parser quotes the line it can't read, and that may be the one with the credential.
"""

from __future__ import annotations

import logging
from typing import Final

from aiohttp.http_exceptions import HttpProcessingError

LOGGER: Final = logging.getLogger("api.protocol")


class _WithoutContent(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ConnectionError):
            # The caller left, or was left; the access log has told of it.
            return False
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = "request_not_understood: %s", (type(error).__name__,)
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


LOGGER.addFilter(_WithoutContent())
