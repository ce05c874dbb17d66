"""Structured logs for every process: JSON in production, readable on a terminal.

Request id, job id and tenant are bound as context (`structlog.contextvars`). Prompts, outputs and
credentials are never logged; `redact` drops them by field name should somebody try.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from config.settings import Log

#: Fields that hold content or credentials.
_PRIVATE = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "content",
        "input",
        "key",
        "messages",
        "output",
        "password",
        "pepper",
        "prompt",
        "secret",
        "text",
        "token",
    }
)


def redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Replace the value of any private field."""
    for name in _PRIVATE & event.keys():
        event[name] = "[redacted]"
    return event


def neutralise(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Escape control characters, so that no value can forge a line or drive a terminal."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name != "exception":
            event[name] = value.encode("unicode_escape").decode()
    return event


def configure(settings: Log, *, process: str) -> None:
    """Set up structlog and the standard library's logging to the same lines on stderr.

    `process` (`api`, `worker`, …) is bound to every line.
    """
    json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    shared: list[Processor] = [
        name_process,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
        structlog.processors.format_exc_info if json else _keep,
        neutralise,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if json
        # Its default shows the local variables of every frame: prompts and keys among them.
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    logging.captureWarnings(True)


def _keep(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
