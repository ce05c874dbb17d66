"""`forebay db`: the accounts database."""

from __future__ import annotations

from pathlib import Path

import click

from api.accounts import schema
from api.accounts.database import make_engine
from api.cli.accounts import account_errors
from api.cli.console import print_json
from api.cli.context import data_dir_option, json_option, resolve


@click.group()
def db() -> None:
    """The accounts database."""


@db.command()
@data_dir_option
@json_option
@account_errors
def upgrade(data_dir: Path | None, as_json: bool) -> None:
    """Bring the schema to the newest revision; safe to repeat."""
    engine = make_engine(resolve(data_dir).database)
    try:
        found, reached = schema.upgrade(engine)
    finally:
        engine.dispose()
    if as_json:
        print_json({"from": found, "to": reached})
    elif found == reached:
        click.echo(f"The accounts database is at revision {reached} already.")
    else:
        click.echo(f"The accounts database went from {found or 'nothing'} to revision {reached}.")
