"""docker-compose.yml validates with Compose itself, and its parts fit the rest of the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.cli.fleet.planning import find_places
from config import catalogue, settings
from loadtests import nginx
from tests.conftest import missing

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
SECRETS = ("REDIS_PASSWORD", "POSTGRES_PASSWORD", "FLOWER_PASSWORD", "FOREBAY_AUTH__PEPPER")


def _compose(*args: str, without: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: "x" for name in SECRETS if name != without}
    return subprocess.run(
        [str(BIN / "docker-compose"), "-f", str(ROOT / "docker-compose.yml"), *args],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    done = _compose("config", "--format", "json")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {
        "valkey",
        "postgres",
        "migrate",
        "api",
        "nginx",
        "worker",
        "webhooks",
        "flower",
        "prometheus",
    }


@pytest.mark.parametrize("name", SECRETS)
def test_a_missing_secret_stops_it(name: str) -> None:
    done = _compose("config", "-q", without=name)
    assert done.returncode != 0
    assert name in done.stderr


def test_every_variable_is_a_setting(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in compose["services"].values():
        for name, value in (service.get("environment") or {}).items():
            if name.startswith("FOREBAY_"):
                monkeypatch.setenv(name, value)
    assert settings.load(_env_file=None).env == "production"


def test_each_model_has_a_worker(compose: dict[str, Any]) -> None:
    """The launcher serves the whole catalogue unless it is told to serve a part of it."""
    assert compose["services"]["worker"]["command"] == ["forebay", "workers", "start"]
    places = find_places(list(catalogue.load().values()), engine="simulated")
    assert {place.model for place in places} == set(catalogue.load())


def test_ports_are_published_on_the_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for s in compose["services"].values() for port in s.get("ports", [])]
    assert ports
    assert all(port["host_ip"] == "127.0.0.1" for port in ports)


def test_nginx_is_in_front_of_the_replicas(compose: dict[str, Any], tmp_path: Path) -> None:
    front = compose["services"]["nginx"]
    given = ROOT / "infra/nginx/forebay.conf"
    assert [Path(each["source"]) for each in front["volumes"]] == [given]
    (shell, flags, script) = front["command"]
    # Compose doubles dollars; there are none. Run what the container runs, up to nginx itself.
    inside = script.replace("/tmp", str(tmp_path)).replace("/etc/forebay.conf", str(given))
    prepare, start = inside.strip().splitlines()
    subprocess.run([shell, flags, prepare], check=True, timeout=10)
    made = tmp_path / "forebay.conf"
    servers = [line.split()[1] for line in made.read_text().splitlines()
               if line.strip().startswith("server ") and "fail_timeout" in line]  # fmt: skip
    assert servers == ["api:8080"]
    assert start == f"exec nginx -p {tmp_path} -c {made} -g 'daemon off;'"
    binary = nginx.program()
    if binary is None:
        missing("nginx")
    # The name is known inside alone.
    made.write_text(made.read_text().replace("api:8080", "127.0.0.1:9"))
    done = subprocess.run(
        [str(binary), "-t", "-p", str(tmp_path), "-c", str(made)],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_prometheus_scrapes_services_that_exist(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    for target in targets:
        host, port = target.split(":")
        environment = compose["services"][host]["environment"]
        assert port in environment.values()


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(ROOT / "infra/docker/Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
