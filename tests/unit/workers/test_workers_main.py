"""The command line of the workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from broker.keys import SCHEMA
from workers.__main__ import main


@pytest.fixture(autouse=True)
def _catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "models.toml").write_text(
        f"""
        [models.here]
        kind = "chat"
        source = "path:{checkpoint}"
        context_tokens = 10
        [models.gone]
        kind = "embedding"
        source = "path:{tmp_path}/nowhere"
        context_tokens = 10
        """
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_MODELS__CATALOGUE", str(tmp_path / "models.toml"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["here"]["cached"], rows["gone"]["cached"]) == (True, False)
    assert rows["here"]["path"].endswith("checkpoint")


def test_pull_reports_and_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "here"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"model": "here", "stage": "ready", "fraction": 1.0}
    assert main(["pull", "gone"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "gone: " in err


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "here"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"model": "here", "problems": []}]
    assert main(["verify", "here", "gone"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"model": "gone", "problems": ["not fetched yet"]}


@pytest.mark.parametrize(
    "arguments", [["pull", "other"], ["verify", "other"], ["--model", "other"], []]
)
def test_unknown_models_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FOREBAY_WORKER__GRACE_S", "soon")
    assert main(["--model", "here"]) == 2
    assert "FOREBAY_WORKER__GRACE_S='soon'" in capsys.readouterr().err


@pytest.mark.parametrize(("outcome", "code"), [("return 3", 3), ("raise RuntimeError('why')", 1)])
def test_a_stuck_thread_does_not_hold_the_process(outcome: str, code: int) -> None:
    """As one inside the model, when the engine has died and the process has to go."""
    program = f"""
import threading
import workers.__main__ as worker

def main():
    threading.Thread(target=threading.Event().wait).start()
    print("said")
    {outcome}

worker.main = main
worker._run()
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, timeout=30, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "said\n")
    assert ("why" in done.stderr) == (code == 1)


def test_data_of_another_schema_version_is_refused(
    valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis.Redis.from_url(valkey) as client:
        client.set(SCHEMA, "99.0")
    monkeypatch.setenv("FOREBAY_REDIS__URL", valkey)
    monkeypatch.setenv("FOREBAY_WORKER__ENGINE", "simulated")
    command = [sys.executable, "-m", "workers", "--model", "here"]
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", str(root))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "schema version 99.0" in done.stderr
    assert "Traceback" not in done.stderr
