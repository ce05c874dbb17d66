"""`forebay up` as a process: ready, used, refused twice, restarted, and ended without a rest."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
from click.testing import CliRunner, Result

from api.cli import main
from tests.conftest import PATIENCE_S

CHAT = "smollm2-135m"
FOREBAY = [sys.executable, "-m", "api.cli"]
UP = ["up", "--engine", "simulated", "--api-port", "0", "--flower-port", "0"]


@dataclass
class Up:
    """One `forebay up`."""

    data_dir: Path
    process: subprocess.Popen[str]
    said: dict[str, Any] = field(default_factory=dict)

    def command(self, *arguments: str) -> Result:
        """A command of the CLI against this stack, called in this process."""
        with pytest.MonkeyPatch.context() as patch:
            # A pipe has no width.
            patch.setenv("COLUMNS", "80")
            done = CliRunner().invoke(main, [*arguments, "--data-dir", str(self.data_dir)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    def process_of(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FOREBAY, *arguments, "--data-dir", str(self.data_dir)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        done = self.command(*arguments, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self) -> str:
        return (self.data_dir.parent / "up.log").read_text()

    def stop(self) -> float:
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0, self.log()[-3000:]
        return time.monotonic() - began


def start(folder: Path, *arguments: str) -> Up:
    with (folder / "up.log").open("a") as log:
        process = subprocess.Popen(
            [*FOREBAY, *UP, "--data-dir", str(folder / "data"), *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    return Up(folder / "data", process)


def ready(folder: Path, *arguments: str) -> Up:
    up = start(folder, *arguments)
    assert up.process.stdout is not None
    line = up.process.stdout.readline()
    assert line, up.log()[-3000:]
    up.said = json.loads(line)
    return up


def kill_all(up: Up) -> None:
    """Leave nothing behind, whatever the test did."""
    if up.process.poll() is None:
        family = up.family()
        up.process.kill()
        for process in family:
            if process.is_running():
                process.kill()
    up.process.wait(10)
    assert up.process.stdout is not None
    up.process.stdout.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A stack for the tests that leave it as it was; none waits until a lease of it lapses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOREBAY_QUEUE__LEASE_TTL_S", "60")
        up = ready(tmp_path_factory.mktemp("up"))
    yield up
    try:
        assert up.stop() < 15
    finally:
        kill_all(up)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Up]:
    """A stack to be mistreated."""
    up = ready(tmp_path, "--models", CHAT)
    yield up
    kill_all(up)


# -- a running stack ------------------------------------------------------------------------------
async def test_it_says_where_everything_is_and_that_is_true(running: Up) -> None:
    assert set(running.said) == {"ready", "api", "flower", "metrics", "admin_key"}
    assert running.said["ready"] is True
    async with aiohttp.ClientSession() as session:
        for url in (
            running.said["api"] + "/readyz",
            running.said["flower"] + "/broker",
            running.said["metrics"],
        ):
            async with session.get(url) as response:
                assert response.status == 200, url


async def test_flower_shows_workers_and_tasks(running: Up) -> None:
    flower = running.said["flower"]
    async with aiohttp.ClientSession() as session, asyncio.timeout(2 * PATIENCE_S):
        while True:
            await asyncio.to_thread(running.json, "submit", "hello", "--max-tokens", "2")
            async with session.get(f"{flower}/api/tasks") as response:
                tasks = (await response.json()).values()
            if any(task["state"] == "SUCCESS" for task in tasks):
                break
        assert {task["name"] for task in tasks} == {"forebay.run_job"}
        # Flower shows who answers its question within a second; on a busy machine not all do.
        while True:
            async with session.get(f"{flower}/api/workers?refresh=1") as response:
                workers = await response.json()
            if {name.split("@")[0] for name in workers} == {CHAT, "all-minilm-l6-v2", "webhooks"}:
                break
    for worker in workers.values():
        assert worker["stats"]["pool"]
        assert len(worker["active_queues"]) == 1


def test_nothing_private_can_be_read_by_others(running: Up) -> None:
    for path in running.data_dir.rglob("*"):
        if path.suffix in (".json", ".conf") or path.name == "accounts.db":
            assert path.stat().st_mode & 0o077 == 0, path
    assert running.data_dir.stat().st_mode & 0o077 == 0
    secrets = json.loads((running.data_dir / "secrets.json").read_text())
    for process in running.family():
        assert secrets["redis_password"] not in " ".join(process.cmdline())
    log = running.log()
    for secret in (*secrets.values(), running.said["admin_key"]):
        assert secret not in log


def test_the_openai_package_works(running: Up) -> None:
    with openai.OpenAI(
        base_url=running.said["api"] + "/v1", api_key=running.said["admin_key"]
    ) as client:
        answer = client.chat.completions.create(
            model=CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=5
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert answer.system_fingerprint == "simulated"


def test_submit_prints_an_answer(running: Up) -> None:
    plain = running.process_of("submit", "hello", "--max-tokens", "6")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("simulated")
    streamed = running.command("submit", "hello", "--max-tokens", "6", "--stream")
    assert streamed.stdout == plain.stdout
    job = running.json("submit", "hello", "--max-tokens", "6", "--priority", "batch")
    assert (job["status"], job["priority"]) == ("completed", "batch")
    assert job["usage"]["output_tokens"] == 6
    events = running.command("submit", "hello", "--max-tokens", "3", "--stream", "--json")
    types = [json.loads(line)["type"] for line in events.stdout.splitlines()]
    assert types[0] == "job.queued"
    assert types[-1] == "job.completed"


def test_jobs_can_be_listed_looked_at_and_cancelled(running: Up) -> None:
    job = running.json("submit", "hello", "--max-tokens", "2")
    assert job["id"] in [row["id"] for row in running.json("jobs", "list")]
    assert running.json("jobs", "get", job["id"])["output"] == job["output"]
    assert job["id"] in running.command("jobs", "list").stdout
    assert "completed" in running.command("jobs", "get", job["id"]).stdout
    # Cancelling what has ended changes nothing.
    assert running.json("jobs", "cancel", job["id"])["status"] == "completed"
    missing = running.command("jobs", "get", "job_00000000000000000000000000")
    assert missing.exit_code == 1
    assert len(missing.stderr.splitlines()) == 1
    assert "Traceback" not in missing.stderr


def test_queues_workers_and_models_are_shown(running: Up) -> None:
    queues = {row["queue"]: row for row in running.json("queues")}
    assert set(queues) == {CHAT, "all-minilm-l6-v2"}
    assert [band["band"] for band in queues[CHAT]["bands"]] == ["interactive", "standard", "batch"]
    assert queues[CHAT]["depth"] == 0
    assert "interactive" in running.command("queues").stdout
    workers = running.json("workers")
    assert {(row["queue"], row["engine"], row["state"]) for row in workers} == {
        (CHAT, "simulated", "ready"),
        ("all-minilm-l6-v2", "simulated", "ready"),
    }
    assert "simulated" in running.command("workers").stdout
    assert {row["name"] for row in running.json("models", "list")} == set(queues)


def test_a_second_up_on_the_same_folder_is_refused(running: Up) -> None:
    again = start(running.data_dir.parent)
    out, _ = again.process.communicate(timeout=PATIENCE_S)
    assert again.process.returncode == 2
    assert out == ""
    last = running.log().splitlines()[-1]
    assert "in use" in last
    assert str(running.process.pid) in last


def test_a_busy_port_is_refused(running: Up, tmp_path: Path) -> None:
    port = running.said["api"].rsplit(":", 1)[1]
    done = subprocess.run(
        [*FOREBAY, *UP, "--data-dir", str(tmp_path / "data"), "--api-port", port],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert port in done.stderr


def chat_worker(up: Up) -> dict[str, Any]:
    (found,) = [each for each in up.json("workers") if each["queue"] == CHAT]
    return dict(found)


async def test_a_killed_worker_comes_back_and_its_jobs_are_done(running: Up) -> None:
    headers = {"Authorization": f"Bearer {running.said['admin_key']}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        body = {
            "endpoint": "/v1/chat/completions",
            "body": {
                "model": CHAT,
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 100,
            },
        }
        async with session.post(running.said["api"] + "/v1/jobs", json=body) as response:
            job_id = (await response.json())["id"]
        url = f"{running.said['api']}/v1/jobs/{job_id}"
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with session.get(url) as response:
                    if (await response.json())["status"] == "in_progress":
                        break
                await asyncio.sleep(0.02)
        worker = chat_worker(running)
        os.kill(worker["pid"], signal.SIGKILL)
        killed = time.monotonic()
        async with session.get(f"{url}?wait=30") as response:
            job = await response.json()
        assert (job["status"], job["attempt"]) == ("completed", 2)
        # Its lease (60 s) was given back at once, not waited for.
        assert time.monotonic() - killed < PATIENCE_S
    new = chat_worker(running)
    assert new["pid"] != worker["pid"]
    assert new["owner"] != worker["owner"]


# -- a stack that is mistreated -------------------------------------------------------------------
def test_sigterm_ends_everything(own: Up) -> None:
    family = own.family()
    assert len(family) == 5
    assert own.stop() < 15
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive, [process.name() for process in alive]
    assert not (own.data_dir / "run.json").exists()
    assert own.command("jobs", "list").exit_code == 2


def test_the_second_signal_ends_it_at_once_but_not_its_echo(own: Up) -> None:
    family = own.family()
    for process in family:
        process.suspend()  # Nobody can end in peace.
    for _ in range(3):
        own.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        own.process.wait(1)
    own.process.send_signal(signal.SIGINT)
    assert own.process.wait(PATIENCE_S) == 130
    deadline = time.monotonic() + PATIENCE_S
    while any(_lives(process) for process in family):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_up_leaves_no_orphan(own: Up, tmp_path: Path) -> None:
    family = own.family()
    own.process.kill()
    own.process.wait(PATIENCE_S)
    # Zombies of a container without an init are gone as far as we are concerned.
    deadline = time.monotonic() + PATIENCE_S
    while left := [p for p in family if _lives(p)]:
        assert time.monotonic() < deadline, [process.name() for process in left]
        time.sleep(0.05)
    # The folder is free again, with the same key and the same data.
    after = ready(tmp_path, "--models", CHAT)
    try:
        assert after.said["admin_key"] == own.said["admin_key"]
        assert after.json("submit", "again", "--max-tokens", "2")["status"] == "completed"
    finally:
        kill_all(after)


def test_a_child_that_can_not_start_ends_it_with_a_reason(tmp_path: Path) -> None:
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(
        '[models.broken]\nkind = "chat"\nsource = "path:/nonexistent"\ncontext_tokens = 8\n'
    )
    done = subprocess.run(
        [*FOREBAY, *UP, "--engine", "transformers", "--data-dir", str(tmp_path / "data")],
        env={**os.environ, "FOREBAY_MODELS__CATALOGUE": str(catalogue)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "giving up: " in done.stderr
    assert "/nonexistent" in done.stderr


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
