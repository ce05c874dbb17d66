"""Devices as NVML tells of them, and processors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config import devices
from config.devices import DeviceError, discover, processors, quota
from tests.nvml import FakeNvml, Gpu, eight, with_mig


def _uuids(nvml: FakeNvml, environ: dict[str, str] | None = None) -> list[str]:
    return [device.uuid for device in discover(nvml, environ or {}).devices]


def test_eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = eight()
    machine = discover(nvml, {})
    assert [device.index for device in machine.devices] == list(range(8))
    assert {device.memory_mib for device in machine.devices} == {80 * 1024}
    assert machine.devices[0].cpus == {0, 1}
    assert machine.devices[7].cpus == {2, 3}
    assert machine.devices[0].name == "NVIDIA H100 80GB HBM3"
    assert machine.problems == ()
    assert nvml.opened == 0


def test_mig_instances_take_their_gpus_place() -> None:
    machine = discover(with_mig(), {})
    assert [(d.uuid, d.index, d.mig) for d in machine.devices] == [
        ("GPU-whole", 0, False),
        ("MIG-1111", 1, True),
        ("MIG-2222", 1, True),
    ]
    assert machine.problems == ("GPU 2 is in MIG mode and has no instances",)


def test_old_gpus_know_no_mig() -> None:
    assert _uuids(FakeNvml([Gpu("GPU-old", knows_mig=False)])) == ["GPU-old"]


def test_a_lost_gpu_is_told_of_and_the_others_are_used() -> None:
    machine = discover(FakeNvml([Gpu("GPU-a"), Gpu("GPU-b", lost=True), Gpu("GPU-c")]), {})
    assert [device.uuid for device in machine.devices] == ["GPU-a", "GPU-c"]
    assert [device.index for device in machine.devices] == [0, 2]
    assert machine.problems == ("GPU 1: GPU is lost",)


@pytest.mark.parametrize("number", [9, 12])
def test_a_machine_without_a_driver_is_a_cpu_machine(number: int) -> None:
    machine = discover(FakeNvml([], broken=number), {})
    assert machine.devices == ()
    assert set(machine.cpus) == os.sched_getaffinity(0)


def test_without_the_bindings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(devices, "import_module", absent)
    assert discover(None, {}).devices == ()


def test_a_broken_driver_is_not_passed_over() -> None:
    nvml = FakeNvml([Gpu("GPU-a")], broken=18)
    with pytest.raises(DeviceError, match="Driver/library version mismatch"):
        discover(nvml, {})
    assert discover(nvml, {}, gpus=False).devices == ()


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        ("", []),
        ("-1", []),
        ("2,0", ["GPU-20000000-aaaa", "GPU-00000000-aaaa"]),
        ("GPU-5", ["GPU-50000000-aaaa"]),
        ("1,-1,3", ["GPU-10000000-aaaa"]),
    ],
)
def test_cuda_visible_devices_narrows_the_choice(allowed: str, found: list[str]) -> None:
    assert _uuids(eight(), {"CUDA_VISIBLE_DEVICES": allowed}) == found


def test_of_a_gpu_that_is_cut_a_number_means_the_first_instance() -> None:
    assert _uuids(with_mig(), {"CUDA_VISIBLE_DEVICES": "1,MIG-2222"}) == ["MIG-1111", "MIG-2222"]


@pytest.mark.parametrize("allowed", ["8", "GPU-", "cuda:0"])
def test_a_choice_of_nothing_is_named(allowed: str) -> None:
    with pytest.raises(DeviceError, match="is not one device here"):
        discover(eight(), {"CUDA_VISIBLE_DEVICES": allowed})


def test_readings_are_what_the_device_tells() -> None:
    nvml = with_mig()
    with devices.session(nvml):
        whole, part, _ = (devices.read(nvml, *each) for each in devices.handles(nvml))
    assert (whole.memory_used_bytes, whole.utilisation, whole.temperature_c) == (2 << 30, 0.73, 61)
    assert (part.uuid, part.index, part.memory_bytes) == ("MIG-1111", 1, 40 << 30)
    assert (part.utilisation, part.temperature_c) == (None, None)


def test_threads_of_one_core_are_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 9})
    for cpu, core in {0: 0, 1: 1, 2: 0, 3: 1}.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
    assert processors(tmp_path) == (0, 2, 1, 3, 9)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_a_quota_bounds_the_processors(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == expected


@pytest.mark.parametrize("text", ["max 100000\n", "nonsense\n", None])
def test_without_a_quota_there_is_no_bound(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert quota(tmp_path) > 1000
