"""`python -m api` as a process: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from api.__main__ import main
from api.accounts.database import make_engine
from api.accounts.schema import upgrade
from api.accounts.service import AccountsService
from config.settings import load
from tests.apiserver import chat, job
from tests.conftest import PATIENCE_S, free_port
from tests.integration.api_process import Process, running

CANARY = "canary-5b1d"


@pytest.fixture
def env(valkey: str, tmp_path: Path) -> dict[str, str]:
    """Settings of an API with an empty accounts database and a free port."""
    settings = {
        "FOREBAY_REDIS__URL": valkey,
        "FOREBAY_DATABASE__URL": f"sqlite:///{tmp_path / 'accounts.db'}",
        "FOREBAY_AUTH__PEPPER": "a pepper that nobody guesses",
        "FOREBAY_API__PORT": str(free_port()),
        "FOREBAY_API__SHUTDOWN_GRACE_S": "2",
        "FOREBAY_LOG__FORMAT": "json",
        "FOREBAY_LOG__LEVEL": "debug",
    }
    return {**os.environ, **settings}


@pytest.fixture
def key(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A key of a new tenant in that database."""
    for name, value in env.items():
        if name.startswith("FOREBAY_"):
            monkeypatch.setenv(name, value)
    settings = load(_env_file=None)
    engine = make_engine(settings.database)
    upgrade(engine)
    engine.dispose()
    service = AccountsService.from_settings(settings)
    tenant = service.create_tenant("tester")
    made = service.create_key(tenant.name, scopes=["jobs", "admin"])
    service.close()
    return made.secret


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def _listed(session: aiohttp.ClientSession, process: Process) -> list[dict[str, Any]]:
    async with session.get(f"{process.url}/v1/jobs") as response:
        jobs: list[dict[str, Any]] = (await response.json())["data"]
        return jobs


async def test_a_process_serves_logs_without_content_and_ends(
    env: dict[str, str], key: str, tmp_path: Path
) -> None:
    env["FOREBAY_API__METRICS_PORT"] = str(free_port())
    with running(env, tmp_path) as process:
        await process.started()
        async with aiohttp.ClientSession(headers=_bearer(key)) as session:
            async with session.post(f"{process.url}/v1/jobs", json=job(CANARY)) as response:
                assert response.status == 202
                url = process.url + (await response.json())["urls"]["self"]
            async with session.get(url) as response:
                assert (await response.json())["status"] == "queued"
            async with session.post(
                f"{process.url}/v1/chat/completions", json=chat(CANARY, frob=CANARY)
            ) as response:
                assert response.status == 400
            async with session.get(f"{process.url}/readyz") as response:
                assert response.status == 503
                assert "accounts" not in (await response.json())["missing"]
            metrics = f"http://127.0.0.1:{env['FOREBAY_API__METRICS_PORT']}/metrics"
            async with session.get(metrics, headers={"Authorization": ""}) as response:
                assert "forebay_api_jobs_submitted_total" in await response.text()
        assert await process.end() == 0
        assert process.stdout == ""
        events = [json.loads(line) for line in process.stderr.splitlines()]
        assert {"api_started", "request_served", "request_refused", "api_stopped"} <= {
            e["event"] for e in events
        }
        assert {event["process"] for event in events} == {"api"}
        assert CANARY not in process.stderr
        assert key not in process.stderr


async def test_a_sync_call_at_shutdown_gets_its_grace_then_loses_its_job(
    env: dict[str, str], key: str, tmp_path: Path
) -> None:
    with running(env, tmp_path) as process:
        await process.started()
        async with aiohttp.ClientSession(headers=_bearer(key)) as session:
            call = asyncio.create_task(
                session.post(f"{process.url}/v1/chat/completions", json=chat())
            )
            async with session.post(f"{process.url}/v1/jobs", json=job()) as response:
                background = (await response.json())["id"]
            url = f"{process.url}/v1/jobs/{background}"
            poll = asyncio.create_task(session.get(f"{url}?wait=30"))
            async with asyncio.timeout(PATIENCE_S):
                while len(await _listed(session, process)) < 2:
                    await asyncio.sleep(0.02)
            assert await process.end() == 0
            assert (await (await poll).json())["status"] == "queued"
            with pytest.raises(aiohttp.ClientError):
                await call
    with running(env, tmp_path, "again") as process:
        await process.started()
        async with aiohttp.ClientSession(headers=_bearer(key)) as session:
            jobs = await _listed(session, process)
        assert {entry["id"]: entry["status"] for entry in jobs}.pop(background) == "queued"
        assert sorted(entry["status"] for entry in jobs) == ["cancelled", "queued"]
        assert await process.end() == 0


async def test_several_processes_share_a_port_and_their_metrics(
    env: dict[str, str], key: str, tmp_path: Path
) -> None:
    shared = tmp_path / "metrics"
    shared.mkdir()
    env |= {
        "FOREBAY_API__PROCESSES": "2",
        "FOREBAY_API__METRICS_PORT": str(free_port()),
        "PROMETHEUS_MULTIPROC_DIR": str(shared),
    }
    first, second = env | {"FOREBAY_PROCESS_INDEX": "0"}, env | {"FOREBAY_PROCESS_INDEX": "1"}
    with running(first, tmp_path, "0") as one, running(second, tmp_path, "1") as other:
        await one.started()
        await other.started()
        served = 0
        # The kernel spreads connections; a few dozen reach both.
        for _ in range(40):
            async with (
                aiohttp.ClientSession(headers=_bearer(key)) as session,
                session.get(f"{one.url}/v1/models") as response,
            ):
                assert response.status == 200
                served += 1
        metrics = f"http://127.0.0.1:{env['FOREBAY_API__METRICS_PORT']}/metrics"
        async with aiohttp.ClientSession() as session, session.get(metrics) as response:
            text = await response.text()
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith("forebay_api_request_duration_seconds_count")
            and 'route="/v1/models"' in line
        ]
        assert float(line.split()[-1]) == served
        assert len(list(shared.glob("histogram_*.db"))) == 2
        assert await one.end() == 0
        assert await other.end() == 0


def _refusal(env: dict[str, str]) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "api"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_an_occupied_port_is_one_line(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(env["FOREBAY_API__PORT"]))):
        code, lines = _refusal(env)
    assert code == 1
    assert lines == [
        f"api: can't listen on 127.0.0.1:{env['FOREBAY_API__PORT']}: address already in use"
    ]


def test_an_unusable_setting_is_one_line(env: dict[str, str]) -> None:
    code, lines = _refusal(env | {"FOREBAY_API__PORT": "http"})
    assert (code, len(lines)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FOREBAY_AUTH__PEPPER", "", "FOREBAY_AUTH__PEPPER"),
        ("FOREBAY_API__PORT", "http", "FOREBAY_API__PORT='http'"),
        ("FOREBAY_MODELS__CATALOGUE", "/nowhere.toml", "/nowhere.toml"),
    ],
)
@pytest.mark.parametrize("mode", ["development", "production"])
def test_bad_settings_are_one_line(
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    name: str,
    value: str,
    said: str,
) -> None:
    for setting, given in (env | {name: value, "FOREBAY_ENV": mode}).items():
        monkeypatch.setenv(setting, given)
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
