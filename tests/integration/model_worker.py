"""A real worker process on the simulated engine, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson

from tests.apiserver import CHAT
from tests.integration.worker_lab import ROOT, until


class WorkerProcess:
    """Ready when made; `env` is added to its settings."""

    def __init__(self, url: str, log: Path, **env: str) -> None:
        self._log = log
        clean = {name: value for name, value in os.environ.items() if "FOREBAY" not in name}
        clean |= {
            "PYTHONPATH": str(ROOT),
            "FOREBAY_REDIS__URL": url,
            "FOREBAY_REDIS__TIMEOUT_S": "1",
            "FOREBAY_WORKER__ENGINE": "simulated",
            "FOREBAY_SIMULATED__STEP_MS": "1",
            "FOREBAY_LOG__FORMAT": "json",
        }
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers", "--model", CHAT],
                cwd=log.parent, env=clean | env, stdout=stream, stderr=stream,
            )  # fmt: skip
        until(lambda: "worker_ready" in self.events(), "the worker is ready")

    def events(self) -> Counter[str]:
        """What it said, but for its jobs."""
        lines = [orjson.loads(x) for x in self._log.read_bytes().splitlines() if x[:1] == b"{"]
        return Counter(str(line["event"]) for line in lines if "job_id" not in line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
