"""What the commands on accounts share: opening the service, its errors, how times are shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from api.accounts.errors import AccountsError, InvalidAccountError
from api.accounts.service import AccountsService
from api.cli.context import resolve
from api.cli.failures import FAILED, MISUSED, CommandError
from broker.limits import RateLimits
from config import logs

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def accounts(data_dir: Path | None) -> Iterator[AccountsService]:
    """The service on the database of this stack; a warning goes to stderr.

    Raises `SchemaError` before anything is done on a database that isn't at our revision.
    """
    settings = resolve(data_dir)
    # On a terminal the command's own words are enough, unless more was asked for.
    asked = "level" in settings.log.model_fields_set
    quiet = settings.log.model_copy(update={"level": "warning"})
    logs.configure(settings.log if asked else quiet, process="cli")

    def warn(line: str) -> None:
        click.echo(f"Warning: {line}", err=True)

    with AccountsService.from_settings(settings, warn=warn) as service:
        service.check_schema()
        yield service


def account_errors(function: F) -> F:
    """One line and exit code 1 for a failure, 2 for a value that isn't allowed."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except InvalidAccountError as error:
            raise CommandError(str(error), exit_code=MISUSED) from None
        except AccountsError as error:
            raise CommandError(str(error), exit_code=FAILED) from None

    return wrapped  # type: ignore[return-value]


def iso(time: datetime | None) -> str | None:
    """For programs: ISO 8601 in UTC."""
    return time.isoformat(timespec="seconds") if time is not None else None


def shown(time: datetime | None) -> str:
    """For people: UTC to the minute."""
    return f"{time:%Y-%m-%d %H:%M}" if time is not None else "never"


def shown_limits(limits: RateLimits) -> str:
    """For people: `60 req/min, 10,000 tok/min, 5 jobs`; nothing where there is no bound."""
    parts = (
        (limits.requests_per_minute, "req/min"),
        (limits.tokens_per_minute, "tok/min"),
        (limits.max_jobs, "jobs"),
    )
    return ", ".join(f"{bound:,} {unit}" for bound, unit in parts if bound)
