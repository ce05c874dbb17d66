"""`forebay workers`: who works, on what and where; `start` runs this machine's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from api.cli.console import duration, print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from api.cli.fleet.start import start
from broker.connections import connect
from broker.redis_queue import RedisQueue
from broker.stats import LeaseStats, WorkerStatus

#: Leases of one model that are looked at.
_LEASES = 10_000


@click.group(invoke_without_command=True)
@click.option("--leases", "show_leases", is_flag=True, help="List the jobs they hold, too.")
@json_option
@data_dir_option
@click.pass_context
def workers(
    context: click.Context, show_leases: bool, as_json: bool, data_dir: Path | None
) -> None:
    """Workers that gave word of themselves within the lease time, and the leases they hold."""
    if context.invoked_subcommand is not None:
        return
    settings = resolve(data_dir)
    with connect(settings.redis) as client:
        queue = RedisQueue(client, settings.queue)
        found = queue.workers()
        held = [
            (name, lease) for name in queue.queues() for lease in queue.leases(name, limit=_LEASES)
        ]
    found = sorted(found, key=lambda worker: (worker.queue, worker.owner))
    if as_json:
        print_json([to_json(worker, (lease for _, lease in held)) for worker in found])
        return
    now_ms = time.time() * 1000
    print_table(
        (
            *("Worker", "Model", "Engine", "Runs on", "State", "Jobs>", "Capacity>"),
            *("Leases>", "Renewed>", "Steps>", "Up>", "Seen>"),
        ),
        [_row(worker, (lease for _, lease in held), now_ms) for worker in found],
        empty="no workers",
    )
    if show_leases and held:
        # Those of a worker that has gone are here until they run out.
        click.echo()
        print_table(
            ("Job", "Model", "Attempt>", "Worker", "Runs>", "Renewed>", "Runs out>"),
            [
                (
                    lease.job_id,
                    name,
                    lease.attempt,
                    lease.owner,
                    duration(max(0.0, now_ms - lease.started_ms)),
                    _ago(now_ms - lease.renewed_ms),
                    f"in {duration(max(0.0, lease.expires_ms - now_ms))}",
                )
                for name, lease in held
            ],
            empty="",
        )


workers.add_command(start)


def to_json(worker: WorkerStatus, leases: Iterable[LeaseStats]) -> dict[str, Any]:
    own = [asdict(lease) for lease in leases if lease.owner == worker.owner]
    return {**asdict(worker), "leases": own}


def _row(worker: WorkerStatus, leases: Iterable[LeaseStats], now_ms: float) -> tuple[Any, ...]:
    own = [lease for lease in leases if lease.owner == worker.owner]
    return (
        worker.owner,
        worker.queue,
        worker.engine,
        worker.place or "-",
        worker.state,
        worker.jobs,
        worker.capacity,
        len(own),
        _ago(now_ms - max(lease.renewed_ms for lease in own)) if own else "-",
        worker.steps,
        duration(max(0.0, now_ms - worker.started_ms)),
        _ago(now_ms - worker.seen_ms),
    )


def _ago(milliseconds: float) -> str:
    return f"{duration(max(0.0, milliseconds))} ago"
