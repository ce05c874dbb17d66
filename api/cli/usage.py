"""`forebay usage`: what a tenant's jobs took, by hour and model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from api.cli.console import print_json, print_table
from api.cli.context import json_option, target_options
from api.cli.remote import remote
from api.client import HourUsage
from broker.usage import MOST_HOURS

_SUMS = (
    *("completed", "failed", "cancelled", "expired"),
    *("input_tokens", "cached_tokens", "output_tokens"),
)


@click.command()
@click.option(
    "--hours",
    type=click.IntRange(1, MOST_HOURS),
    default=24,
    show_default=True,
    help="The running hour is the last one.",
)
@click.option("--model")
@click.option("--tenant", help="Id of another tenant; needs a key with the scope admin.")
@json_option
@target_options
def usage(
    hours: int,
    model: str | None,
    tenant: str | None,
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """Jobs of the key's tenant that ended, and their tokens, by hour and model."""

    async def run(client: Any) -> list[HourUsage]:
        found: list[HourUsage] = await client.usage(hours=hours, model=model, tenant=tenant)
        return found

    found = remote(run, data_dir=data_dir, url=api_url, key=api_key)
    if as_json:
        print_json([each.raw for each in found])
        return
    print_table(
        (
            *("Hour", "Model", "Completed>", "Failed>", "Cancelled>", "Expired>"),
            *("Input>", "Cached>", "Output>"),
        ),
        rows(found),
        empty="no job has ended",
    )


def rows(found: Iterable[HourUsage]) -> list[tuple[Any, ...]]:
    """The hours as they come, then the sum of each model."""
    hours = list(found)
    table: list[tuple[Any, ...]] = [
        (_clock(each.hour), each.model, *_figures([each])) for each in hours
    ]
    by_model = groupby(sorted(hours, key=lambda each: each.model), key=lambda each: each.model)
    return table + [("all", model, *_figures(list(each))) for model, each in by_model]


def _figures(hours: list[HourUsage]) -> tuple[int, ...]:
    return tuple(sum(getattr(each, name) for each in hours) for name in _SUMS)


def _clock(unix_s: int) -> str:
    """In local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))
