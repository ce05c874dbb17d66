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
