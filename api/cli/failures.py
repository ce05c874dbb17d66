"""How the command fails: one line on stderr and an exit code; no traceback for known causes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

#: Something went wrong while doing what was asked.
FAILED = 1
#: What was asked can't be done as it was asked (arguments, settings, a busy port or folder).
MISUSED = 2


class CommandError(click.ClickException):
    """Ends the command with `Error: <message>` on one line, below `details` if there are any."""

    def __init__(self, message: str, *, exit_code: int = FAILED, details: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self._code = exit_code
        self.details = details

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return self._code

    def show(self, file: IO[Any] | None = None) -> None:
        if self.details:
            click.echo(self.details, file=file, err=True)
        super().show(file)


@contextmanager
def reported() -> Iterator[None]:
    """Turn the known errors of the packages below into a `CommandError`."""
    from broker.errors import BrokerError
    from config.settings import SettingsError

    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), exit_code=MISUSED) from None
    except BrokerError as error:
        raise CommandError(str(error)) from None
