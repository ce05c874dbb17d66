"""A worker is bound before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import Settings, SettingsError
from workers import pinning
from workers.pinning import cpu_set, pin

ROOT = Path(__file__).parents[3]


def test_processors_and_threads_are_those_torch_finds() -> None:
    """In a process of its own, as binding can't be taken back here."""
    cpu = max(os.sched_getaffinity(0))
    code = (
        "import os, sys\n"
        "from config.settings import load\n"
        "from workers.pinning import pin, place_of, unbind\n"
        "pin(load())\n"
        "assert 'torch' not in sys.modules\n"
        "unbind()\n"
        "print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'],\n"
        "      os.environ['OMP_WAIT_POLICY'], os.environ['CUDA_DEVICE_ORDER'],\n"
        "      place_of(os.environ))"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "FOREBAY_WORKER__CPUS": str(cpu),
        "FOREBAY_WORKER__THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[{cpu}] 1 passive PCI_BUS_ID 1 cpus\n"


def test_a_processor_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_processors", set())
    with pytest.raises(SettingsError, match="FOREBAY_WORKER__CPUS='100000'"):
        pin(Settings(_env_file=None, worker={"cpus": "100000"}))


def test_processors_by_ranges() -> None:
    assert cpu_set("0-2,8") == {0, 1, 2, 8}


@pytest.mark.parametrize("text", ["a", "1-", "1,,2", "-1"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cpus"):
        Settings(_env_file=None, worker={"cpus": text})
