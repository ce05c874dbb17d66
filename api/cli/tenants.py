"""`forebay tenants`: create, change and list tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from api.accounts.records import Tenant
from api.cli.accounts import account_errors, accounts, iso, shown, shown_limits
from api.cli.console import print_json, print_table
from api.cli.context import F, data_dir_option, json_option
from broker.jobs import BANDS, Band


def _band(_: click.Context, __: click.Parameter, value: str | None) -> Band | None:
    return Band(value) if value else None


def _policy_options(function: F) -> F:
    """Options of a tenant's policy, named as the service's parameters; None is not given."""
    options = (
        click.option("--weight", type=float, help="Share relative to other tenants."),
        click.option("--max-in-flight", type=int, help="Jobs of one model running at once."),
        click.option("--max-queued", type=int, help="Jobs of one model that may wait."),
        click.option("--requests-per-minute", type=int, help="Of all models; 0 is without bound."),
        click.option("--tokens-per-minute", type=int, help="Of all models; 0 is without bound."),
        click.option("--max-jobs", type=int, help="Accepted, not ended; 0 is without bound."),
        click.option(
            "--priority",
            "default_band",
            type=click.Choice([band.value for band in BANDS]),
            callback=_band,
            help="Priority of a job that names none.",
        ),
        click.option(
            "--allow-logprobs/--no-logprobs",
            "allow_logprobs",
            default=None,
            help="Whether answers may be had with their logprobs.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def tenants() -> None:
    """Create, list and change tenants."""


@tenants.command()
@click.argument("name")
@_policy_options
@data_dir_option
@json_option
@account_errors
def create(name: str, data_dir: Path | None, as_json: bool, **policy: Any) -> None:
    """Create a tenant called NAME; what isn't given is the installation's default."""
    with accounts(data_dir) as service:
        tenant = service.create_tenant(name, **policy)
    _print([tenant], as_json=as_json, single=True)


@tenants.command("set")
@click.argument("name")
@_policy_options
@click.option(
    "--disable/--enable",
    "disabled",
    default=None,
    help="Refuse its credentials; what it has queued still runs.",
)
@data_dir_option
@json_option
@account_errors
def set_(
    name: str,
    disabled: bool | None,
    data_dir: Path | None,
    as_json: bool,
    **policy: Any,
) -> None:
    """Change the tenant NAME (or id); what isn't given stays."""
    with accounts(data_dir) as service:
        tenant = service.set_tenant(name, disabled=disabled, **policy)
    _print([tenant], as_json=as_json, single=True)


@tenants.command("list")
@data_dir_option
@json_option
@account_errors
def list_(data_dir: Path | None, as_json: bool) -> None:
    """List all tenants."""
    with accounts(data_dir) as service:
        found = service.list_tenants()
    _print(found, as_json=as_json)


def _print(found: list[Tenant], *, as_json: bool, single: bool = False) -> None:
    if as_json:
        documents = [_document(tenant) for tenant in found]
        print_json(documents[0] if single else documents)
        return
    print_table(
        (
            "Tenant",
            "Id",
            "Weight>",
            "In flight>",
            "Queued>",
            "Limits",
            "Priority",
            "Created",
            "State",
        ),
        [
            (
                tenant.name,
                tenant.id,
                f"{tenant.policy.weight:g}",
                f"{tenant.policy.max_in_flight:,}",
                f"{tenant.policy.max_queued:,}",
                shown_limits(tenant.policy.limits),
                tenant.policy.default_band.value,
                shown(tenant.created_at),
                "disabled" if tenant.disabled_at else "active",
            )
            for tenant in found
        ],
        empty="No tenants.",
    )


def _document(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "name": tenant.name,
        "weight": tenant.policy.weight,
        "max_in_flight": tenant.policy.max_in_flight,
        "max_queued": tenant.policy.max_queued,
        "requests_per_minute": tenant.policy.requests_per_minute,
        "tokens_per_minute": tenant.policy.tokens_per_minute,
        "max_jobs": tenant.policy.max_jobs,
        "priority": tenant.policy.default_band.value,
        "allow_logprobs": tenant.policy.allow_logprobs,
        "created_at": iso(tenant.created_at),
        "updated_at": iso(tenant.updated_at),
        "disabled_at": iso(tenant.disabled_at),
    }
