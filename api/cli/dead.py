"""`forebay dead`: jobs that were given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from api.cli.console import print_json, print_table
from api.cli.context import json_option, target_options
from api.cli.failures import MISUSED, CommandError
from api.cli.jobs import clock
from api.cli.remote import remote

_PATH = "/v1/dead_letters"
_FIELDS = ("job_id", "model", "tenant", "code", "attempt", "died_at", "endpoint", "priority")


@click.group()
def dead() -> None:
    """Look at dead letters, put their jobs in again, drop them. Needs a key with scope admin."""


@dead.command("list")
@click.option("--model", help="Only those of this model.")
@click.option("--tenant", help="Only those of this tenant (id).")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@json_option
@target_options
def list_(model: str | None, tenant: str | None, limit: int, as_json: bool, **target: Any) -> None:
    """Dead letters, the newest of each model first."""

    async def run(client: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after: str | None = None
        while len(found) < limit:
            size = str(min(limit - len(found), 100))
            page = await client.call(
                "GET", _PATH, model=model, tenant=tenant, after=after, limit=size
            )
            found += page["data"]
            after = page["next"]
            if after is None:
                break
        return found

    letters = _remote(run, target)
    if as_json:
        print_json(letters)
        return
    print_table(
        ("Job", "Model", "Tenant", "Code", "Attempts>", "Died", "Replayable"),
        [
            (
                letter["job_id"],
                letter["model"],
                letter["tenant"],
                letter["code"],
                letter["attempt"],
                clock(letter["died_at"]),
                "yes" if letter["replayable"] else "no",
            )
            for letter in letters
        ],
        empty="no dead letters",
    )


@dead.command()
@click.argument("job_id")
@json_option
@target_options
def show(job_id: str, as_json: bool, **target: Any) -> None:
    """One dead letter with its error."""

    async def run(client: Any) -> dict[str, Any]:
        letter: dict[str, Any] = await client.call("GET", f"{_PATH}/{job_id}")
        return letter

    letter = _remote(run, target)
    if as_json:
        print_json(letter)
        return
    rows = [(name, letter[name]) for name in _FIELDS if letter[name] is not None]
    rows = [(name, clock(value) if name == "died_at" else value) for name, value in rows]
    rows.append(("error", (letter["error"] or {}).get("message")))
    rows.append(("replayable", "yes" if letter["replayable"] else "no"))
    print_table(("Field", "Value"), rows, empty=job_id)


def _selection(function: Any) -> Any:
    function = click.option("--tenant", help="Only those of this tenant (id).")(function)
    function = click.option("--model", help="All of this model instead of one job.")(function)
    return click.argument("job_id", required=False)(function)


@dead.command()
@_selection
@click.option("--limit", type=click.IntRange(1, 1000), default=1000, show_default=True)
@json_option
@target_options
def replay(
    job_id: str | None,
    model: str | None,
    tenant: str | None,
    limit: int,
    as_json: bool,
    **target: Any,
) -> None:
    """Put the job JOB_ID in again, or those of a --model (oldest first), with all attempts."""
    _check(job_id, model, tenant)

    async def run(client: Any) -> dict[str, Any]:
        path, query = f"{_PATH}/replay", {"model": model, "tenant": tenant, "limit": str(limit)}
        if job_id:
            path, query = f"{_PATH}/{job_id}/replay", {}
        answer: dict[str, Any] = await client.call("POST", path, **query)
        return answer

    answer = _remote(run, target)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['replayed']} put in again")


@dead.command()
@_selection
@json_option
@target_options
def purge(
    job_id: str | None, model: str | None, tenant: str | None, as_json: bool, **target: Any
) -> None:
    """Drop the dead letter of JOB_ID, or those of a --model. The jobs stay failed."""
    _check(job_id, model, tenant)

    async def run(client: Any) -> dict[str, Any]:
        path, query = (f"{_PATH}/{job_id}", {}) if job_id else (_PATH, _query(model, tenant))
        answer: dict[str, Any] = await client.call("DELETE", path, **query)
        return answer

    answer = _remote(run, target)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['purged']} dropped")


def _query(model: str | None, tenant: str | None) -> dict[str, str | None]:
    return {"model": model, "tenant": tenant}


def _check(job_id: str | None, model: str | None, tenant: str | None) -> None:
    if bool(job_id) == bool(model) or (tenant and job_id):
        raise CommandError("give one JOB_ID, or --model and perhaps --tenant", exit_code=MISUSED)


def _remote(run: Any, target: dict[str, Any]) -> Any:
    data_dir: Path | None = target["data_dir"]
    return remote(run, data_dir=data_dir, url=target["api_url"], key=target["api_key"])
