"""Gauges of the devices a worker may use."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from tests.nvml import FakeNvml, Gpu, eight, with_mig
from workers.device_metrics import DeviceMetrics


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _read(nvml: FakeNvml, visible: str | None) -> dict[str, dict[str, float]]:
    """Gauge -> uuid -> value, after the thread has read and gone."""
    registry = CollectorRegistry()
    metrics = DeviceMetrics(visible, registry=registry, nvml=nvml, every_s=60)
    metrics.start()
    metrics.stop()
    _until(lambda: not metrics._thread.is_alive())
    return {
        family.name.removeprefix("forebay_workers_device_"): {
            sample.labels["uuid"]: sample.value for sample in family.samples
        }
        for family in registry.collect()
    }


def test_a_workers_own_devices_are_shown() -> None:
    gauges = _read(eight(), "GPU-20000000-aaaa,GPU-5")
    uuids = {"GPU-20000000-aaaa", "GPU-50000000-aaaa"}
    assert gauges == {
        "memory_bytes": dict.fromkeys(uuids, 80 * 1024**3),
        "memory_used_bytes": dict.fromkeys(uuids, 2 * 1024**3),
        "utilization_ratio": dict.fromkeys(uuids, 0.73),
        "temperature_celsius": dict.fromkeys(uuids, 61.0),
    }


def test_all_devices_where_none_is_chosen() -> None:
    assert len(_read(eight(), None)["memory_bytes"]) == 8


def test_an_instance_tells_of_its_memory_only() -> None:
    gauges = _read(with_mig(), "MIG-1111")
    assert gauges["memory_used_bytes"] == {"MIG-1111": 1024**3}
    assert gauges["temperature_celsius"] == {}


@pytest.mark.parametrize("number", [12, 18])
def test_without_a_driver_nothing_is_shown(number: int) -> None:
    assert not any(_read(FakeNvml([Gpu("GPU-a")], broken=number), None).values())


def test_a_worker_on_the_cpu_doesnt_ask() -> None:
    nvml = eight()
    metrics = DeviceMetrics("", registry=CollectorRegistry(), nvml=nvml)
    metrics.start()
    assert not metrics._thread.is_alive()
    metrics.stop()
