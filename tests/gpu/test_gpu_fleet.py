"""Discovery and pinning on real NVIDIA devices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from api.cli.fleet.placement import place
from config import catalogue, devices
from config.devices import discover
from workers.device_metrics import DeviceMetrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not discover(environ={}).devices, reason="no NVIDIA device"),
]

_SEEN = (
    "from config.settings import load\n"
    "from workers.pinning import pin\n"
    "pin(load())\n"
    "import torch\n"
    "print(*[torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())])\n"
)


def test_a_worker_sees_its_device_and_no_other() -> None:
    machine = discover(environ={})
    for each in place(list(catalogue.load().values()), machine):
        assert each.devices
        done = subprocess.run(
            [sys.executable, "-c", _SEEN],
            env={**os.environ, **each.environment()},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        seen = done.stdout.split()
        assert len(seen) == 1
        if not each.devices[0].mig:
            assert each.devices[0].uuid.removeprefix("GPU-") in seen[0]


def test_readings() -> None:
    with devices.session() as nvml:
        readings = [devices.read(nvml, *each) for each in devices.handles(nvml)]
    assert readings
    assert all(each.memory_bytes and each.memory_used_bytes is not None for each in readings)
    registry = CollectorRegistry()
    metrics = DeviceMetrics(None, registry=registry, every_s=60)
    metrics.start()
    metrics.stop()
    metrics._thread.join(30)
    found = {sample.labels["uuid"] for family in registry.collect() for sample in family.samples}
    assert found == {each.uuid for each in readings}
