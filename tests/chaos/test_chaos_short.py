"""The run of `make chaos` with a few faults: nothing is lost, doubled, disordered or stuck."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 110


def test_a_few_faults_under_load() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.chaos", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    figures = json.loads(done.stdout.splitlines()[-1])
    zeros = [figures[name] for name in ("lost", "doubled", "disordered", "stuck")]
    assert zeros == [0, 0, 0, 0], said
    assert (figures["faults"], figures["worker_kills"]) == (12, 6), said
    assert figures["jobs"] > 100, said
    # Kills that hit no job would prove nothing.
    assert figures["recovery_max_s"] > 0, said
