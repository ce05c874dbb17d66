"""Where a command finds the stack: the environment, or the data directory of `forebay up`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from api.cli.datadir import DataDir
from api.cli.failures import MISUSED, CommandError
from config import settings as config_settings
from config.settings import PREFIX, Settings

F = TypeVar("F", bound=Callable[..., Any])

#: Address and key of the API for the commands that speak HTTP.
URL_VARIABLE = "FOREBAY_URL"
KEY_VARIABLE = "FOREBAY_API_KEY"


@dataclass(frozen=True)
class Target:
    """An API and the key to use with it."""

    url: str
    key: str


def resolve(data_dir: Path | None = None) -> Settings:
    """The settings a command should use.

    With `data_dir`, what `forebay up` wrote there wins over the environment; without, the
    environment wins and the default data directory fills in what it leaves open. Raises
    `SettingsError`.
    """
    settings = config_settings.load()
    home = DataDir(data_dir or settings.data_dir)
    known = _known_variables(home)
    if data_dir is None:
        known = {name: value for name, value in known.items() if not _is_set(settings, name)}
    if not known:
        return settings
    return config_settings.load(**_nested(known))


def resolve_target(
    data_dir: Path | None = None, *, url: str | None = None, key: str | None = None
) -> Target:
    """Address and key of the API: options first, then the environment, then the data directory.

    Raises `CommandError` that says how to give what is missing.
    """
    run = None
    if not (url and key):
        run = DataDir(data_dir or config_settings.load().data_dir).run()
    environment: Mapping[str, str] = {} if data_dir is not None and run else os.environ
    url = url or environment.get(URL_VARIABLE) or (run.api if run else None)
    key = key or environment.get(KEY_VARIABLE) or (run.admin_key if run else None)
    if not url:
        raise CommandError(
            f"no running stack found: start `forebay up`, or give --api or {URL_VARIABLE}",
            exit_code=MISUSED,
        )
    if not key:
        raise CommandError(f"no API key: give --key or {KEY_VARIABLE}", exit_code=MISUSED)
    return Target(url=url.rstrip("/"), key=key)


def data_dir_option(function: F) -> F:
    """`--data-dir`: the stack of that `forebay up`."""
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Data directory of the `forebay up` to talk to.",
    )(function)


def target_options(function: F) -> F:
    """`--api`, `--key` and `--data-dir` for commands that speak HTTP."""
    function = click.option("--api", "api_url", help=f"Address of the API (or {URL_VARIABLE}).")(
        function
    )
    function = click.option("--key", "api_key", help=f"API key (or {KEY_VARIABLE}).")(function)
    return data_dir_option(function)


def json_option(function: F) -> F:
    """`--json`: one JSON document on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def _known_variables(home: DataDir) -> dict[str, str]:
    """Settings that the data directory implies, as environment variables."""
    run = home.run()
    if run is not None:
        return {
            **run.env,
            "FOREBAY_REDIS__URL": run.redis_url,
            "FOREBAY_DATABASE__URL": run.database_url,
        }
    secrets = home.known_secrets()
    if secrets is None:
        return {}
    # Accounts can be managed while nothing runs; the queue can't.
    return {
        "FOREBAY_DATABASE__URL": home.database_url,
        "FOREBAY_AUTH__PEPPER": secrets.pepper,
        "FOREBAY_DATA_DIR": str(home.root),
    }


def _path(name: str) -> list[str]:
    return name.removeprefix(PREFIX).lower().split("__")


def _is_set(settings: Settings, name: str) -> bool:
    """Whether the environment (or `.env`) gave this variable."""
    node: Any = settings
    for part in _path(name):
        if part not in node.model_fields_set:
            return False
        node = getattr(node, part)
    return True


def _nested(variables: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in variables.items():
        *parents, leaf = _path(name)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
