"""What `forebay up` starts: addresses, the environment of every child, and their command lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import api
from api.cli.datadir import DataDir
from api.cli.fleet.placement import Place
from api.cli.fleet.planning import find_places
from api.cli.ports import claim_port, http_address
from api.cli.supervisor import Spec
from config.catalogue import ModelSpec
from config.settings import Settings, SettingsError

#: Folder of the packages: children find them wherever `forebay up` was started.
_ROOT = str(Path(api.__file__).resolve().parent.parent)

#: Of this command's environment, what its children have no use for.
_NOT_PASSED_ON = frozenset(
    {"FOREBAY_URL", "FOREBAY_API_KEY", "PROMETHEUS_MULTIPROC_DIR", "PYTHONDONTWRITEBYTECODE"}
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line of `forebay up` said; None leaves a setting as it is."""

    data_dir: Path | None = None
    api_port: int | None = None
    flower_port: int | None = None
    #: 0 is any free port, as for the other two; so is None unless the settings name one.
    metrics_port: int | None = None
    engine: str | None = None
    models: tuple[str, ...] = ()
    flower: bool = True
    webhooks: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stack ready to be started."""

    home: DataDir
    api: str
    flower: str
    metrics: str
    engine: str
    models: tuple[ModelSpec, ...]
    #: Where their workers run.
    places: tuple[Place, ...]
    vllm_python: str
    api_processes: int
    with_flower: bool
    with_webhooks: bool
    #: Settings that differ from this process's environment, as `FOREBAY_…` variables.
    settings: Mapping[str, str]
    environment: Mapping[str, str] = field(repr=False)

    def api_specs(self) -> list[Spec]:
        many = self.api_processes > 1
        return [
            Spec(
                name=f"api-{number}" if many else "api",
                argv=python("api"),
                env=self.environment,
                on_exit=self._forget_metrics,
            )
            for number in range(1, self.api_processes + 1)
        ]

    def worker_specs(self, release: Callable[[int], None]) -> list[Spec]:
        """`release` gives back the leases of a worker process that is gone, by its pid."""

        def on_exit(pid: int) -> None:
            self._forget_metrics(pid)
            release(pid)

        return [
            Spec(
                name=f"worker-{place.name}",
                argv=python(
                    *("workers", "--model", place.model, "--name", place.name),
                    interpreter=self.vllm_python if place.engine == "vllm" else "",
                ),
                env={**self.environment, **place.environment()},
                on_exit=on_exit,
            )
            for place in self.places
        ]

    def webhook_specs(self) -> list[Spec]:
        if not self.with_webhooks:
            return []
        argv = python("workers", "webhooks")
        name = "worker-webhooks"
        return [Spec(name=name, argv=argv, env=self.environment, on_exit=self._forget_metrics)]

    def flower_specs(self) -> list[Spec]:
        if not self.with_flower:
            return []
        # Flower keeps its own metrics; they have no place in the aggregate.
        env = {k: v for k, v in self.environment.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
        return [Spec(name="flower", argv=python("infra.console"), env=env)]

    def clean_metrics(self) -> None:
        """Counters of an earlier run would be added to this one's."""
        for file in self.home.metrics.glob("*.db"):
            file.unlink(missing_ok=True)

    def _forget_metrics(self, pid: int) -> None:
        from prometheus_client import multiprocess

        # Drops the gauges of what runs now; counters stay, so that sums never go back.
        multiprocess.mark_process_dead(pid, str(self.home.metrics))  # type: ignore[no-untyped-call]


def make_plan(
    settings: Settings,
    catalogue: Mapping[str, ModelSpec],
    options: Options,
    *,
    home: DataDir,
    redis_url: str,
    pepper: str,
    readable_logs: bool,
) -> Plan:
    """Choose ports and say how everything runs. Writes nothing but a narrowed catalogue.

    Raises `SettingsError` and `PortBusyError`.
    """
    models = _chosen(catalogue, options.models)
    engine = options.engine or settings.worker.engine
    # The API, Redis and whatever else runs here want the processors too: nobody is bound to any.
    places = find_places(models, engine=engine, bind=False)
    api_port = claim_port(settings.api.host, _first(options.api_port, settings.api.port))
    metrics_port = claim_port(
        settings.api.metrics_host, _first(options.metrics_port, settings.api.metrics_port)
    )
    flower_port = 0
    if options.flower:
        flower_port = claim_port(
            settings.flower.host, _first(options.flower_port, settings.flower.port)
        )
    changed = {
        "FOREBAY_DATA_DIR": str(home.root),
        "FOREBAY_REDIS__URL": redis_url,
        "FOREBAY_DATABASE__URL": (
            settings.database.url.get_secret_value()
            if "url" in settings.database.model_fields_set
            else home.database_url
        ),
        "FOREBAY_AUTH__PEPPER": pepper,
        "FOREBAY_API__PORT": str(api_port),
        "FOREBAY_API__METRICS_PORT": str(metrics_port),
        "FOREBAY_WORKER__ENGINE": engine,
    }
    if options.flower:
        changed["FOREBAY_FLOWER__PORT"] = str(flower_port)
    elif "task_events" not in settings.worker.model_fields_set:
        # Nobody would listen.
        changed["FOREBAY_WORKER__TASK_EVENTS"] = "false"
    if options.models:
        home.catalogue.write_text(catalogue_toml(models))
        changed["FOREBAY_MODELS__CATALOGUE"] = str(home.catalogue)
    if settings.log.format == "auto" and readable_logs:
        changed["FOREBAY_LOG__FORMAT"] = "console"
    environment = child_environment({**changed, "PROMETHEUS_MULTIPROC_DIR": str(home.metrics)})
    return Plan(
        home=home,
        api=http_address(settings.api.host, api_port),
        flower=http_address(settings.flower.host, flower_port) if options.flower else "",
        metrics=http_address(settings.api.metrics_host, metrics_port) + "/metrics",
        engine=engine,
        models=models,
        places=tuple(places),
        vllm_python=settings.worker.vllm_python,
        api_processes=settings.api.processes,
        with_flower=options.flower,
        with_webhooks=options.webhooks,
        settings=changed,
        environment=environment,
    )


def child_environment(changed: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one of our own modules, with some variables set."""
    path = os.environ.get("PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON},
        **changed,
        "PYTHONPATH": f"{_ROOT}{os.pathsep}{path}" if path else _ROOT,
        "PYTHONUNBUFFERED": "1",
    }


def python(module: str, *arguments: str, interpreter: str = "") -> list[str]:
    """An interpreter (this one) on one of our modules; a folder named `api` at hand can't get in
    (-P)."""
    return [interpreter or sys.executable, "-P", "-m", module, *arguments]


def catalogue_toml(models: tuple[ModelSpec, ...]) -> str:
    """The entries as `models.toml` has them."""
    lines: list[str] = []
    for model in models:
        lines.append(f"[models.{json.dumps(model.name)}]")
        lines += [
            f"{name} = {_toml(value)}"
            for name, value in model.model_dump(
                exclude={"name"}, exclude_unset=True, exclude_none=True
            ).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)} = {_toml(each)}" for name, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    # A JSON string, number or list of them is a TOML one.
    return json.dumps(value)


def _chosen(catalogue: Mapping[str, ModelSpec], names: tuple[str, ...]) -> tuple[ModelSpec, ...]:
    for name in names:
        if name not in catalogue:
            raise SettingsError(f"--models: {name!r} is none of {', '.join(sorted(catalogue))}")
    return tuple(spec for name, spec in catalogue.items() if not names or name in names)


def _first(given: int | None, default: int) -> int:
    return default if given is None else given
