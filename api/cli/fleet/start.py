"""The command `forebay workers start`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from api.cli.console import print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from api.cli.failures import CommandError
from api.cli.fleet.placement import Place
from api.cli.fleet.planning import find_places
from config import catalogue, logs
from config.catalogue import ModelSpec
from config.settings import SettingsError


@click.command()
@click.option("--models", default="", help="Comma-separated names; all of the catalogue if absent.")
@click.option("--cpu", is_flag=True, help="Leave the machine's devices alone.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "simulated"]),
    help="simulated runs no model and says so everywhere.",
)
@click.option("--dry-run", is_flag=True, help="Say what would run where, and start nothing.")
@json_option
@data_dir_option
def start(
    models: str, cpu: bool, engine: str | None, dry_run: bool, as_json: bool, data_dir: Path | None
) -> None:
    """Run this machine's workers, and keep them running until Ctrl-C or SIGTERM.

    Devices are found and given to the models of the catalogue; a worker that ends is started
    again, one that stands still is taken out. SIGUSR1 replaces all workers, one after another, each
    by a new one that is ready before the old one drains. A second SIGTERM kills.
    """
    settings = resolve(data_dir)
    if engine is not None:
        worker = settings.worker.model_copy(update={"engine": engine})
        settings = settings.model_copy(update={"worker": worker})
    names = tuple(name.strip() for name in models.split(",") if name.strip())

    def replan() -> list[Place]:
        chosen = _chosen(catalogue.load(settings.models.catalogue), names)
        return find_places(chosen, engine=settings.worker.engine, cpu=cpu)

    places = replan()
    if dry_run:
        _show(places, as_json=as_json)
        return
    logs.configure(settings.log, process="workers")
    # Imported late: the others of these commands need no event loop.
    from api.cli.fleet.launcher import run

    try:
        sys.exit(run(settings, places, replan))
    except OSError as error:
        raise CommandError(f"the metrics' listener: {error.strerror or error}") from None


def _chosen(models: Mapping[str, ModelSpec], names: Sequence[str]) -> list[ModelSpec]:
    for name in names:
        if name not in models:
            raise SettingsError(f"--models: {name!r} is none of {', '.join(sorted(models))}")
    return [spec for name, spec in models.items() if not names or name in names]


def _show(places: Sequence[Place], *, as_json: bool) -> None:
    if as_json:
        print_json([_to_json(each) for each in places])
        return
    print_table(
        ("Worker", "Model", "Runs on", "Devices", "Memory MiB>", "Threads>"),
        [
            (
                each.name,
                each.model,
                each.where,
                ", ".join(device.name for device in each.devices) or "-",
                each.device_memory_mib or "all",
                each.threads or "all",
            )
            for each in places
        ],
        empty="no models",
    )


def _to_json(each: Place) -> dict[str, Any]:
    return {
        "name": each.name,
        "model": each.model,
        "runs_on": each.where,
        "devices": [
            {"uuid": device.uuid, "index": device.index, "name": device.name, "mig": device.mig}
            for device in each.devices
        ],
        "device_memory_mib": each.device_memory_mib,
        "cpus": list(each.cpus),
        "threads": each.threads,
        "environment": each.environment(),
    }
