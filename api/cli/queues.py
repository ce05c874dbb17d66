"""`forebay queues`: what waits, for how long, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from api.cli.console import duration, print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from broker.connections import connect
from broker.redis_queue import RedisQueue
from broker.stats import QueueStats
from config import catalogue
from config.settings import Settings


@click.command()
@click.option("--top", type=click.IntRange(0, 1000), default=10, show_default=True)
@json_option
@data_dir_option
def queues(top: int, as_json: bool, data_dir: Path | None) -> None:
    """Depth, oldest age and running jobs of every queue, and its busiest tenants (--top)."""
    settings = resolve(data_dir)
    with connect(settings.redis) as client:
        queue = RedisQueue(client, settings.queue)
        names = set(queue.queues()) | set(catalogue.load(settings.models.catalogue))
        found = [queue.stats(name, top=top) for name in sorted(names)]
    tenants = _tenant_names(settings) if any(stats.top_tenants for stats in found) else {}
    if as_json:
        print_json([to_json(stats, tenants) for stats in found])
        return
    print_table(
        ("Queue", "Priority", "Waiting>", "Oldest>", "Running>", "Delayed>", "Dead>"),
        [row for stats in found for row in _rows(stats)],
        empty="no queues",
    )
    busy = [
        (stats.queue, tenants.get(tenant.tenant, tenant.tenant), tenant.queued, tenant.in_flight)
        for stats in found
        for tenant in stats.top_tenants
    ]
    if busy:
        click.echo()
        print_table(("Queue", "Tenant", "Waiting>", "Running>"), busy, empty="")


def to_json(stats: QueueStats, tenants: Mapping[str, str]) -> dict[str, Any]:
    """One queue; `tenants` gives names to ids."""
    document = asdict(stats)
    document["depth"] = stats.depth
    document["top_tenants"] = [
        {**asdict(tenant), "name": tenants.get(tenant.tenant)} for tenant in stats.top_tenants
    ]
    return document


def _rows(stats: QueueStats) -> list[tuple[Any, ...]]:
    """One row per priority; what is counted per queue stands in the first."""
    rows: list[tuple[Any, ...]] = []
    for number, band in enumerate(stats.bands):
        shared: tuple[Any, ...] = (stats.in_flight, stats.delayed, stats.dead)
        rows.append(
            (
                "" if number else stats.queue,
                band.band.value,
                band.depth,
                duration(band.oldest_ms) if band.depth else "-",
                *(shared if number == 0 else ("", "", "")),
            )
        )
    return [tuple(" " if cell == "" else cell for cell in row) for row in rows]


def _tenant_names(settings: Settings) -> dict[str, str]:
    """Names by id; none when the accounts can't be read: the queues matter here."""
    from api.accounts.errors import AccountsError
    from api.accounts.service import AccountsService

    with suppress(AccountsError), AccountsService.from_settings(settings) as service:
        return {tenant.id: tenant.name for tenant in service.list_tenants()}
    return {}
