"""What `forebay up` would start."""

from __future__ import annotations

import os
import socket
import sys
import tomllib
from pathlib import Path

import pytest

from api.cli.datadir import DataDir
from api.cli.plan import Options, Plan, catalogue_toml, make_plan
from api.cli.ports import PortBusyError, claim_port, http_address
from config import catalogue
from config.settings import SettingsError, load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataDir:
    monkeypatch.chdir(tmp_path)
    home = DataDir(tmp_path / "d")
    home.create()
    return home


def plan(home: DataDir, *, readable_logs: bool = False, **options: object) -> Plan:
    free = {"api_port": 0, "flower_port": 0, "metrics_port": 0}
    return make_plan(
        load(),
        catalogue.load(),
        Options(**{**free, **options}),  # type: ignore[arg-type]
        home=home,
        redis_url="redis://r:1/0",
        pepper="p" * 32,
        readable_logs=readable_logs,
    )


def test_children_are_told_everything(home: DataDir) -> None:
    made = plan(home, engine="simulated")
    env = made.environment
    assert env["FOREBAY_REDIS__URL"] == "redis://r:1/0"
    assert env["FOREBAY_DATABASE__URL"] == f"sqlite:///{home.root}/accounts.db"
    assert env["FOREBAY_AUTH__PEPPER"] == "p" * 32
    assert env["FOREBAY_WORKER__ENGINE"] == "simulated"
    assert env["PROMETHEUS_MULTIPROC_DIR"] == str(home.metrics)
    assert made.api == f"http://127.0.0.1:{env['FOREBAY_API__PORT']}"
    assert made.metrics == f"http://127.0.0.1:{env['FOREBAY_API__METRICS_PORT']}/metrics"
    assert "FOREBAY_LOG__FORMAT" not in env
    assert "p" * 32 not in repr(made).replace(str(made.settings), "")
    ports = {made.api, made.flower, made.metrics.removesuffix("/metrics")}
    assert len(ports) == 3


def test_one_worker_per_model_and_flower_apart(home: DataDir) -> None:
    made = plan(home)
    released: list[int] = []
    workers = made.worker_specs(released.append)
    assert [spec.name for spec in workers] == ["worker-smollm2-135m", "worker-all-minilm-l6-v2"]
    assert workers[0].argv == [
        sys.executable, "-P", "-m", "workers", "--model", "smollm2-135m", "--name", "smollm2-135m",
    ]  # fmt: skip
    # Other processes want the processors too.
    assert "FOREBAY_WORKER__CPUS" not in workers[0].env
    assert workers[0].env["FOREBAY_WORKER__PLACE"] == "cpu"
    (flower,) = made.flower_specs()
    assert "PROMETHEUS_MULTIPROC_DIR" not in flower.env
    assert [spec.name for spec in made.api_specs()] == ["api"]
    assert workers[0].on_exit is not None
    workers[0].on_exit(4711)
    assert released == [4711]


def test_a_choice_of_models_becomes_their_catalogue(home: DataDir) -> None:
    made = plan(home, models=("all-minilm-l6-v2",))
    path = made.environment["FOREBAY_MODELS__CATALOGUE"]
    assert catalogue.load(path) == {"all-minilm-l6-v2": catalogue.load()["all-minilm-l6-v2"]}
    with pytest.raises(SettingsError, match="--models: 'x' is none of"):
        plan(home, models=("x",))


def test_a_catalogue_survives_writing() -> None:
    models = catalogue.load()
    assert set(tomllib.loads(catalogue_toml(tuple(models.values())))["models"]) == set(models)


def test_every_field_of_an_entry_survives_writing(tmp_path: Path) -> None:
    entry = catalogue.ModelSpec(
        name="a.b",
        kind="classifier",
        source='path:/models/"x"',
        context_tokens=512,
        thresholds={"very bad": 0.25, "bad": 1},
        harmless=("neutral", 'a "b"'),
    )
    path = tmp_path / "models.toml"
    path.write_text(catalogue_toml((entry,)))
    assert catalogue.load(str(path)) == {"a.b": entry}


def test_settings_of_the_caller_are_kept(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_DATABASE__URL", "postgresql+psycopg://db/x")
    monkeypatch.setenv("FOREBAY_API__PROCESSES", "3")
    monkeypatch.setenv("FOREBAY_URL", "http://other")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    made = plan(home, flower=False, readable_logs=True)
    assert made.environment["FOREBAY_DATABASE__URL"] == "postgresql+psycopg://db/x"
    assert made.environment["FOREBAY_LOG__FORMAT"] == "console"
    assert "FOREBAY_URL" not in made.environment
    assert made.environment["PYTHONPATH"].endswith(f"{os.pathsep}/mine")
    assert [spec.name for spec in made.api_specs()] == ["api-1", "api-2", "api-3"]
    assert made.flower_specs() == []
    assert made.flower == ""
    assert made.environment["FOREBAY_WORKER__TASK_EVENTS"] == "false"


def test_old_metrics_are_cleaned_and_dead_ones_forgotten(home: DataDir) -> None:
    for name in ("counter_1.db", "gauge_livesum_1.db"):
        (home.metrics / name).write_bytes(b"")
    made = plan(home)
    (api,) = made.api_specs()
    assert api.on_exit is not None
    api.on_exit(1)
    assert [path.name for path in home.metrics.iterdir()] == ["counter_1.db"]
    made.clean_metrics()
    assert list(home.metrics.iterdir()) == []


# -- ports ----------------------------------------------------------------------------------------
def test_a_busy_port_is_named() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(PortBusyError, match=f"port {port} on 127.0.0.1"):
            claim_port("127.0.0.1", port)
    assert claim_port("127.0.0.1", port) == port
    assert claim_port("127.0.0.1", 0) > 0
    with pytest.raises(PortBusyError):
        claim_port("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_how_to_reach_a_listener(host: str, address: str) -> None:
    assert http_address(host, 80) == address
