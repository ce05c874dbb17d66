"""`forebay jobs`: look at jobs, cancel and retry them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from api.cli.console import duration, print_json, print_table, show
from api.cli.context import json_option, target_options
from api.cli.failures import CommandError
from api.cli.remote import remote
from api.client import RemoteJob
from broker.jobs import BANDS, Status

#: Jobs cancelled by one call.
_CANCELS = 1_000

_FIELDS = (
    "id",
    "status",
    "model",
    "endpoint",
    "priority",
    "attempt",
    "created_at",
    "started_at",
    "completed_at",
    "deadline_at",
    "metadata",
    "queue",
    "usage",
    "error",
    "output",
)


@click.group()
def jobs() -> None:
    """Look at jobs, cancel and retry them."""


@jobs.command()
@click.argument("job_id")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=0, help="Seconds to wait for its end."
)
@json_option
@target_options
def get(
    job_id: str,
    wait: float,
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """One job with its result."""

    async def run(client: Any) -> RemoteJob:
        job: RemoteJob = await client.get(job_id)
        deadline = time.monotonic() + wait
        while not job.is_terminal and (left := deadline - time.monotonic()) > 0:
            job = await client.get(job_id, wait_s=min(left, 30.0))
        return job

    _print_job(remote(run, data_dir=data_dir, url=api_url, key=api_key), as_json=as_json)


@jobs.command(name="list")
@click.option("--status", type=click.Choice([status.value for status in Status]))
@click.option("--model")
@click.option("--priority", type=click.Choice([band.value for band in BANDS]))
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@json_option
@target_options
def list_jobs(
    status: str | None,
    model: str | None,
    priority: str | None,
    limit: int,
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """The newest jobs of the key's tenant."""

    async def run(client: Any) -> list[RemoteJob]:
        found: list[RemoteJob] = await client.list_jobs(
            limit=limit, status=status, model=model, priority=priority
        )
        return found

    found = remote(run, data_dir=data_dir, url=api_url, key=api_key)
    if as_json:
        print_json([job.raw for job in found])
        return
    print_table(
        ("ID", "Status", "Model", "Priority", "Created", "Waited>", "Ran>", "Tokens>"),
        [_row(job) for job in found],
        empty="no jobs",
    )


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB_ID...")
@json_option
@target_options
def cancel(
    job_ids: tuple[str, ...],
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """Stop jobs; a running one stops at its next step.

    With --json one id prints its job, several print what became of each.
    """
    if len(job_ids) == 1:

        async def run_one(client: Any) -> RemoteJob:
            job: RemoteJob = await client.cancel(job_ids[0])
            return job

        job = remote(run_one, data_dir=data_dir, url=api_url, key=api_key)
        if as_json:
            print_json(job.raw)
        else:
            click.echo(f"{job.id}: {job.status}")
        return

    async def run(client: Any) -> dict[str, str]:
        results: dict[str, str] = {}
        for start in range(0, len(job_ids), _CANCELS):
            results |= await client.cancel_many(job_ids[start : start + _CANCELS])
        return results

    results = remote(run, data_dir=data_dir, url=api_url, key=api_key)
    if as_json:
        print_json(results)
    else:
        for job_id, result in results.items():
            click.echo(f"{job_id}: {result.replace('_', ' ')}")
    if missing := sum(result == "not_found" for result in results.values()):
        raise CommandError(f"{missing} of {len(results)} jobs don't exist")


@jobs.command()
@click.argument("job_id")
@json_option
@target_options
def retry(
    job_id: str,
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """Put a failed or expired job in again, with all its attempts."""

    async def run(client: Any) -> RemoteJob:
        job: RemoteJob = await client.retry(job_id)
        return job

    job = remote(run, data_dir=data_dir, url=api_url, key=api_key)
    if as_json:
        print_json(job.raw)
    else:
        click.echo(f"{job.id}: {job.status}")


def _print_job(job: RemoteJob, *, as_json: bool) -> None:
    if as_json:
        print_json(job.raw)
        return
    print_table(
        ("Field", "Value"),
        [(name, _value(name, job.raw[name])) for name in _FIELDS if job.raw.get(name)],
        empty=job.id,
    )


def _value(name: str, value: Any) -> str:
    if name.endswith("_at"):
        return clock(value)
    if isinstance(value, Mapping) and name != "output":
        return ", ".join(f"{key} {show(item)}" for key, item in value.items() if item is not None)
    return show(value)


def _row(job: RemoteJob) -> tuple[Any, ...]:
    return (
        job.id,
        job.status,
        job.model,
        job.priority,
        clock(job.raw.get("created_at")),
        duration(job.usage.get("queue_ms")),
        duration(job.usage.get("run_ms")),
        job.usage.get("total_tokens"),
    )


def clock(at: Any) -> str:
    """Unix seconds as local date and time."""
    if not isinstance(at, (int, float)) or not at:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
