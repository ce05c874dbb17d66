"""`forebay queues`: what waits, for how long, and whose it is; pause, drain and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from api.cli.console import duration, print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from api.cli.failures import MISUSED, CommandError
from broker.connections import connect
from broker.redis_queue import RedisQueue
from broker.stats import QueueStats
from config import catalogue
from config.settings import Settings


@click.group(invoke_without_command=True)
@click.option("--top", type=click.IntRange(0, 1000), default=10, show_default=True)
@json_option
@data_dir_option
@click.pass_context
def queues(ctx: click.Context, top: int, as_json: bool, data_dir: Path | None) -> None:
    """What waits and runs in every queue, how fast it gets done, and its busiest tenants (--top).

    With a command: hold a queue up, let it run empty, or let it go on.
    """
    if ctx.invoked_subcommand is not None:
        return
    with _opened(data_dir) as (settings, queue):
        found = [queue.stats(name, top=top) for name in _names(settings, queue)]
    tenants = _tenant_names(settings) if any(stats.top_tenants for stats in found) else {}
    if as_json:
        print_json([to_json(stats, tenants) for stats in found])
        return
    print_table(
        (
            *("Queue", "Mode", "Priority", "Waiting>", "Oldest>"),
            *("Running>", "Delayed>", "Dead>", "Jobs/s>", "Tokens/s>"),
        ),
        [row for stats in found for row in _rows(stats)],
        empty="no queues",
    )
    busy = [
        (
            stats.queue,
            tenants.get(tenant.tenant, tenant.tenant),
            tenant.queued,
            tenant.in_flight,
            tenant.jobs_per_s,
        )
        for stats in found
        for tenant in stats.top_tenants
    ]
    if busy:
        click.echo()
        print_table(("Queue", "Tenant", "Waiting>", "Running>", "Jobs/s>"), busy, empty="")


@queues.command()
@click.argument("model")
@json_option
@data_dir_option
def pause(model: str, as_json: bool, data_dir: Path | None) -> None:
    """Start no more jobs of MODEL; new ones are taken and wait."""
    _switch(model, RedisQueue.pause, as_json=as_json, data_dir=data_dir)


@queues.command()
@click.argument("model")
@json_option
@data_dir_option
def drain(model: str, as_json: bool, data_dir: Path | None) -> None:
    """Take no new jobs of MODEL (503 queue_draining); those that wait still run."""
    _switch(model, RedisQueue.drain, as_json=as_json, data_dir=data_dir)


@queues.command()
@click.argument("model")
@json_option
@data_dir_option
def resume(model: str, as_json: bool, data_dir: Path | None) -> None:
    """End a pause or drain of MODEL."""
    _switch(model, RedisQueue.resume, as_json=as_json, data_dir=data_dir)


def _switch(
    model: str, to: Callable[[RedisQueue, str], None], *, as_json: bool, data_dir: Path | None
) -> None:
    with _opened(data_dir) as (settings, queue):
        if model not in _names(settings, queue):
            raise CommandError(f"there is no queue {model!r}", exit_code=MISUSED)
        to(queue, model)
        stats = queue.stats(model, top=0)
    if as_json:
        print_json({"queue": model, "mode": stats.mode})
    else:
        click.echo(f"{model}: {stats.mode}, {stats.depth} waiting, {stats.in_flight} running")


@contextmanager
def _opened(data_dir: Path | None) -> Iterator[tuple[Settings, RedisQueue]]:
    settings = resolve(data_dir)
    with connect(settings.redis) as client:
        yield settings, RedisQueue(client, settings.queue)


def _names(settings: Settings, queue: RedisQueue) -> list[str]:
    return sorted(set(queue.queues()) | set(catalogue.load(settings.models.catalogue)))


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
        shared: tuple[Any, ...] = (
            *(stats.in_flight, stats.delayed, stats.dead),
            *(stats.jobs_per_s, stats.tokens_per_s),
        )
        rows.append(
            (
                "" if number else stats.queue,
                "" if number else stats.mode,
                band.band.value,
                band.depth,
                duration(band.oldest_ms) if band.depth else "-",
                *(shared if number == 0 else ("",) * len(shared)),
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
