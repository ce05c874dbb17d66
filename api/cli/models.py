"""`forebay models`: the catalogue, and the files behind it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from api.cli.console import print_json, print_table
from api.cli.context import data_dir_option, json_option, resolve
from api.cli.failures import CommandError
from api.cli.plan import child_environment, python
from api.cli.pulling import PullError, progress_bars, pull
from config import catalogue
from config.catalogue import ModelSpec
from config.settings import Settings, SettingsError


@click.group()
def models() -> None:
    """The model catalogue and its files."""


@models.command(name="list")
@json_option
@data_dir_option
def list_models(as_json: bool, data_dir: Path | None) -> None:
    """Every model of the catalogue and whether its files are here."""
    settings = resolve(data_dir)
    cached = {row["model"]: row for row in _cache(settings)}
    found = [
        {
            **spec.model_dump(),
            "endpoints": list(spec.endpoints),
            "cached": bool(cached.get(name, {}).get("cached")),
            "path": cached.get(name, {}).get("path"),
        }
        for name, spec in catalogue.load(settings.models.catalogue).items()
    ]
    if as_json:
        print_json(found)
        return
    print_table(
        ("Name", "Kind", "Files", "Context>", "Batch>", "Source", "Description"),
        [
            (
                model["name"],
                model["kind"],
                "here" if model["cached"] else "to be pulled",
                model["context_tokens"],
                model["max_batch"],
                model["source"],
                model["description"],
            )
            for model in found
        ],
        empty="the catalogue is empty",
    )


@models.command(name="pull")
@click.argument("names", nargs=-1)
@json_option
@data_dir_option
def pull_models(names: tuple[str, ...], as_json: bool, data_dir: Path | None) -> None:
    """Fetch and convert models (all of the catalogue without NAMES)."""
    settings = resolve(data_dir)
    known = catalogue.load(settings.models.catalogue)
    wanted = _wanted(names, known)
    try:
        with progress_bars() as report:
            asyncio.run(pull(wanted, _environment(settings), report=report))
    except PullError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json([row for row in _cache(settings) if row["model"] in wanted])


@models.command(name="verify")
@click.argument("names", nargs=-1)
@json_option
@data_dir_option
def verify_models(names: tuple[str, ...], as_json: bool, data_dir: Path | None) -> None:
    """Check fetched models against their digests (all of the catalogue without NAMES).

    Exits with 1 when one isn't here or isn't what was fetched.
    """
    settings = resolve(data_dir)
    wanted = _wanted(names, catalogue.load(settings.models.catalogue))
    rows = _ask_workers(settings, "verify", *wanted, fine=(0, 1))
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("Name", "Files"),
            [(row["model"], "; ".join(row["problems"]) or "as they were fetched") for row in rows],
            empty="the catalogue is empty",
        )
    failed = [row["model"] for row in rows if row["problems"]]
    if failed:
        raise CommandError(f"not as they should be: {', '.join(failed)}")


def _wanted(names: Sequence[str], known: Mapping[str, ModelSpec]) -> list[str]:
    for name in names:
        if name not in known:
            raise SettingsError(f"{name!r} is none of {', '.join(sorted(known))}")
    return list(names) or list(known)


def _environment(settings: Settings) -> dict[str, str]:
    return child_environment(
        {
            "FOREBAY_MODELS__CATALOGUE": settings.models.catalogue,
            "FOREBAY_MODELS__CACHE_DIR": settings.models.cache_dir,
        }
    )


def _cache(settings: Settings) -> list[dict[str, Any]]:
    """What is in the model cache; the workers' side knows its layout."""
    return _ask_workers(settings, "list")


def _ask_workers(
    settings: Settings, *arguments: str, fine: tuple[int, ...] = (0,)
) -> list[dict[str, Any]]:
    done = subprocess.run(
        python("workers", *arguments),
        env=_environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in fine or not done.stdout:
        reason = done.stderr.strip().splitlines()
        raise CommandError(reason[-1] if reason else "the model cache can't be read")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows
