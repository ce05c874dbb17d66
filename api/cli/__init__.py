"""The `forebay` command. Each subcommand lives in a module that is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from api.cli.failures import reported

#: name -> (module, what `forebay --help` says about it); the module holds a command of that name.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("api.cli.up", "Start everything on this machine and keep it running."),
    "demo": ("api.cli.demo", "Start the stack, show what it does, stop it."),
    "submit": ("api.cli.submit", "Send one prompt and print the answer."),
    "jobs": ("api.cli.jobs", "Look at jobs, cancel and retry them."),
    "dead": ("api.cli.dead", "Jobs that were given up: look, put in again, drop."),
    "queues": ("api.cli.queues", "Depth, age and rate of every queue; pause, drain, resume."),
    "usage": ("api.cli.usage", "Ended jobs and their tokens by hour and model."),
    "workers": ("api.cli.workers", "Workers that are alive, and their leases."),
    "models": ("api.cli.models", "The model catalogue and its files."),
    "tenants": ("api.cli.tenants", "Create, list and change tenants."),
    "keys": ("api.cli.keys", "Create, list and revoke API keys."),
    "db": ("api.cli.db", "The accounts database."),
}


class _LazyGroup(click.Group):
    """Knows its commands by name, so that `--help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(COMMANDS[cmd_name][0])
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with reported():
            return super().invoke(ctx)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="forebay", message="%(version)s")
def main() -> None:
    """Forebay: fair queues per tenant in front of batched inference workers."""
