"""`forebay workers`: who works, and on what."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from api.cli.console import duration, print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from broker.connections import connect
from broker.redis_queue import RedisQueue


@click.command()
@json_option
@data_dir_option
def workers(as_json: bool, data_dir: Path | None) -> None:
    """Workers that gave word of themselves within the lease time."""
    settings = resolve(data_dir)
    with connect(settings.redis) as client:
        found = RedisQueue(client, settings.queue).workers()
    found = sorted(found, key=lambda worker: (worker.queue, worker.owner))
    if as_json:
        print_json([asdict(worker) for worker in found])
        return
    now_ms = time.time() * 1000
    print_table(
        ("Worker", "Model", "Engine", "State", "Jobs>", "Capacity>", "Steps>", "Up>", "Seen>"),
        [
            (
                worker.owner,
                worker.queue,
                worker.engine,
                worker.state,
                worker.jobs,
                worker.capacity,
                worker.steps,
                duration(max(0.0, now_ms - worker.started_ms)),
                f"{duration(max(0.0, now_ms - worker.seen_ms))} ago",
            )
            for worker in found
        ],
        empty="no workers",
    )
