"""`forebay keys`: create, limit, list and revoke API keys."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from api.accounts.records import ApiKey
from api.auth.principal import SCOPES
from api.cli.accounts import account_errors, accounts, iso, shown, shown_limits
from api.cli.console import print_json, print_table
from api.cli.context import F, data_dir_option, json_option

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Lifetime(click.ParamType[timedelta]):
    """`90m`, `12h`, `30d` or `8w`."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        found = re.fullmatch(r"([0-9]{1,6})([mhdw])", str(value), re.ASCII)
        if found is None:
            self.fail(f"{value!r} isn't a duration like 12h, 30d or 8w", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _limit_options(function: F) -> F:
    """Options of a key's limits, named as the service's parameters; None is not given."""
    for decorate in (
        click.option("--max-jobs", type=int, help="Accepted and not ended; 0 is without bound."),
        click.option("--tokens-per-minute", type=int, help="Within the tenant's; 0: no bound."),
        click.option("--requests-per-minute", type=int, help="Within the tenant's; 0: no bound."),
    ):
        function = decorate(function)
    return function


@click.group()
def keys() -> None:
    """Create, limit, list and revoke API keys."""


@keys.command()
@click.argument("tenant")
@click.option("--name", default="", help="What the key is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(sorted(SCOPES)),
    default=("jobs",),
    show_default=True,
    help="What the key may do; repeat for several.",
)
@click.option("--expires", type=_Lifetime(), help="Lifetime, e.g. 12h, 30d, 8w.")
@_limit_options
@data_dir_option
@json_option
@account_errors
def create(
    tenant: str,
    name: str,
    scopes: tuple[str, ...],
    expires: timedelta | None,
    data_dir: Path | None,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Create a key of TENANT (name or id). The key is shown this once."""
    with accounts(data_dir) as service:
        new = service.create_key(tenant, name=name, scopes=scopes, expires_in=expires, **limits)
    if as_json:
        print_json({**_document(new.key), "key": new.secret})
        return
    until = f", expires {shown(new.key.expires_at)} UTC" if new.key.expires_at else ""
    click.echo(f"{new.key.id} for {new.key.tenant_name}{until}. Shown only this once:", err=True)
    click.echo(new.secret)


@keys.command("set")
@click.argument("key_id")
@_limit_options
@data_dir_option
@json_option
@account_errors
def set_(
    key_id: str,
    data_dir: Path | None,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Change the limits of the key KEY_ID (key_…), on every API process within seconds."""
    with accounts(data_dir) as service:
        key = service.set_key(key_id, **limits)
    _print([key], as_json=as_json)


@keys.command("list")
@click.argument("tenant", required=False)
@data_dir_option
@json_option
@account_errors
def list_(tenant: str | None, data_dir: Path | None, as_json: bool) -> None:
    """List the keys of TENANT (name or id), or all."""
    with accounts(data_dir) as service:
        found = service.list_keys(tenant)
    _print(found, as_json=as_json)


@keys.command()
@click.argument("key_id")
@data_dir_option
@json_option
@account_errors
def revoke(key_id: str, data_dir: Path | None, as_json: bool) -> None:
    """Revoke the key KEY_ID (key_…) for good, on every API process within seconds."""
    with accounts(data_dir) as service:
        key = service.revoke_key(key_id)
    if as_json:
        print_json(_document(key))
    else:
        click.echo(f"{key.id} of {key.tenant_name} is revoked.")


def _print(found: list[ApiKey], *, as_json: bool) -> None:
    if as_json:
        print_json([_document(key) for key in found])
        return
    now = datetime.now(UTC)
    print_table(
        (
            "Key",
            "Tenant",
            "Name",
            "Prefix",
            "Scopes",
            "Limits",
            "Created",
            "Last used",
            "Expires",
            "State",
        ),
        [
            (
                key.id,
                key.tenant_name,
                key.name,
                f"{key.prefix}…",
                " ".join(sorted(key.scopes)),
                shown_limits(key.limits),
                shown(key.created_at),
                shown(key.last_used_at),
                shown(key.expires_at),
                key.status(now),
            )
            for key in found
        ],
        empty="No keys.",
    )


def _document(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant_id": key.tenant_id,
        "tenant": key.tenant_name,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": sorted(key.scopes),
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        "max_jobs": key.limits.max_jobs,
        "status": key.status(datetime.now(UTC)),
        "created_at": iso(key.created_at),
        "last_used_at": iso(key.last_used_at),
        "expires_at": iso(key.expires_at),
        "revoked_at": iso(key.revoked_at),
    }
