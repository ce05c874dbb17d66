"""`forebay demo` on the simulated engine: all scenes, and nothing left behind unless asked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import PATIENCE_S

FOREBAY = [sys.executable, "-m", "api.cli"]


def _demo(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FOREBAY, "demo", *arguments],
        env={**os.environ, "TMPDIR": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def _left(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder of the demo."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_every_scene_is_shown(tmp_path: Path) -> None:
    # A Redis of the caller's is none of the demo's business.
    done = _demo(
        tmp_path, "--engine", "simulated", FOREBAY_REDIS__URL="redis://127.0.0.1:1/0", KEEP=""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Engine: simulated.")
    for tenant in ("aurora", "borealis", "cascade", "delta"):
        row = next(line for line in done.stdout.splitlines() if re.match(rf"{tenant} +\d", line))
        assert row.split()[3] == "8", row
    assert "32 chats, 1024 tokens" in done.stdout
    assert "8 of 8 slots taken, 1 job waiting" in done.stdout
    assert "simulated vectors carry no meaning" in done.stdout
    assert "Stopped in" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert _left(tmp_path) == []


def test_kept_it_runs_on(tmp_path: Path) -> None:
    done = _demo(tmp_path, "--engine", "simulated", KEEP="1", FOREBAY_SIMULATED__STEP_MS="5")
    try:
        assert done.returncode == 0, done.stderr
        stop = re.search(r"kill (\d+)", done.stdout)
        assert stop is not None
        up = psutil.Process(int(stop[1]))
        folder = re.search(r"--data-dir (\S+)", done.stdout)
        assert folder is not None
        asked = subprocess.run(
            [*FOREBAY, "workers", "--data-dir", folder[1]],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert "simulated" in asked.stdout
        up.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([up], timeout=PATIENCE_S)
        assert not alive
    finally:
        for process in _left(tmp_path):
            process.kill()


def test_a_demo_that_can_not_start_says_why(tmp_path: Path) -> None:
    catalogue = tmp_path / "models.toml"
    catalogue.write_text('[models.m]\nkind = "chat"\nsource = "path:/x"\ncontext_tokens = 8\n')
    done = _demo(tmp_path, FOREBAY_MODELS__CATALOGUE=str(catalogue))
    assert done.returncode == 1
    assert done.stderr == "Error: the catalogue has no embedding model\n"
