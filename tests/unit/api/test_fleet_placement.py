"""Which worker runs where."""

from __future__ import annotations

from typing import Any

import pytest

from api.cli.fleet.placement import Place, PlacementError, place, ranges
from config.catalogue import ModelSpec
from config.devices import Machine, discover
from tests.nvml import FakeNvml, Gpu, eight, with_mig


def _spec(name: str, **more: Any) -> ModelSpec:
    fields = {"name": name, "kind": "chat", "source": "path:/m", "context_tokens": 8}
    if more.get("devices", 1) > 1:
        fields["engine"] = "vllm"
    return ModelSpec.model_validate(fields | more)


def _machine(nvml: FakeNvml | None = None, cpus: int = 4, count: int = 0) -> Machine:
    devices = discover(nvml, {}).devices if nvml else ()
    return Machine(devices=devices, cpus=tuple(range(cpus)), cpu_count=count or cpus)


def _where(places: list[Place]) -> dict[str, str]:
    return {each.name: each.where for each in places}


# -- devices --------------------------------------------------------------------------------------
def test_one_model_to_a_device_one_over_a_group_and_small_ones_together() -> None:
    models = [
        _spec("small-a", device_memory_mib=30_000),
        _spec("alone"),
        _spec("large", devices=4),
        _spec("small-b", device_memory_mib=40_000),
        _spec("small-c", device_memory_mib=20_000),
        _spec("old", devices=0),
    ]
    places = place(models, _machine(eight()))
    assert _where(places) == {
        "large": "GPU 0+1+2+3",
        "alone": "GPU 4",
        "small-a": "GPU 5",
        "small-b": "GPU 5",
        "small-c": "GPU 6",
        "old": "cpu 0-3",
    }
    found = {each.name: each for each in places}
    assert found["large"].environment() == {
        "CUDA_VISIBLE_DEVICES": ",".join(f"GPU-{i}0000000-aaaa" for i in range(4)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "FOREBAY_WORKER__PLACE": "GPU 0+1+2+3",
        "FOREBAY_WORKER__CPUS": "0-1",
        "FOREBAY_WORKER__THREADS": "1",
    }
    assert found["small-b"].environment()["FOREBAY_WORKER__DEVICE_MEMORY_MIB"] == "40000"
    assert found["alone"].cpus == (2, 3)
    # One that runs on the CPU sees no device.
    assert found["old"].environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_a_group_keeps_to_one_side_of_the_machine() -> None:
    models = [_spec("two", devices=2), _spec("four", devices=4)]
    assert _where(place(models, _machine(eight()))) == {"four": "GPU 0+1+2+3", "two": "GPU 4+5"}
    three = [_spec("first", devices=3), _spec("second", devices=3)]
    assert _where(place(three, _machine(eight()))) == {
        "first": "GPU 0+1+2",
        "second": "GPU 4+5+6",
    }


def test_a_group_is_of_one_kind() -> None:
    nvml = FakeNvml([Gpu("GPU-a"), Gpu("GPU-b", name="NVIDIA L4", memory=1 << 34), Gpu("GPU-c")])
    assert _where(place([_spec("two", devices=2)], _machine(nvml))) == {"two": "GPU 0+2"}
    with pytest.raises(PlacementError, match="three wants 3 whole devices of one kind; 2 are left"):
        place([_spec("three", devices=3)], _machine(nvml))


def test_a_mig_instance_is_a_device_and_in_no_group() -> None:
    models = [_spec("a"), _spec("b"), _spec("c", device_memory_mib=30_000)]
    places = place(models, _machine(with_mig()))
    assert [each.environment()["CUDA_VISIBLE_DEVICES"] for each in places] == [
        "GPU-whole",
        "MIG-1111",
        "MIG-2222",
    ]
    assert places[1].where == "GPU 1 (MIG-1111…)"
    # What CUDA takes for each process is not given away.
    with pytest.raises(PlacementError, match="c wants 39000 MiB"):
        place([_spec("a"), _spec("c", device_memory_mib=39_000)], _machine(with_mig()))
    with pytest.raises(PlacementError, match="1 are left"):
        place([_spec("two", devices=2)], _machine(with_mig()))


def test_several_workers_and_the_rest_in_turns() -> None:
    models = [_spec("rest", workers=0), _spec("two", workers=2), _spec("more", workers=0)]
    assert _where(place(models, _machine(eight()))) == {
        "rest-1": "GPU 2", "rest-2": "GPU 4", "rest-3": "GPU 6",
        "two-1": "GPU 0", "two-2": "GPU 1",
        "more-1": "GPU 3", "more-2": "GPU 5", "more-3": "GPU 7",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([_spec("a"), _spec("b")], "b wants a device of its own; none is left"),
        ([_spec("a", device_memory_mib=90_000)], "a wants 90000 MiB of a device"),
        ([_spec("a"), _spec("b", device_memory_mib=1)], "b wants 1 MiB of a device"),
    ],
)
def test_what_has_no_room_is_named(models: list[ModelSpec], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        place(models, _machine(FakeNvml([Gpu("GPU-a")])))


# -- processors -----------------------------------------------------------------------------------
def test_without_devices_everything_runs_on_the_cpu() -> None:
    models = [_spec("a"), _spec("b", device_memory_mib=4000), _spec("c", workers=0)]
    places = place(models, _machine(cpus=8))
    assert _where(places) == {"a": "cpu 0-2", "b": "cpu 3-5", "c": "cpu 6-7"}
    assert [each.threads for each in places] == [3, 3, 2]
    assert {each.device_memory_mib for each in places} == {0}
    with pytest.raises(PlacementError, match="large wants 2 devices; there are none here"):
        place([_spec("large", devices=2)], _machine())


def test_too_few_processors_are_shared() -> None:
    """Bound threads wait for each other where others run on their processors (decision 0005)."""
    for machine, bind in ((_machine(cpus=3), True), (_machine(cpus=8), False)):
        places = place([_spec("a"), _spec("b")], machine, bind=bind)
        assert [(each.where, each.threads) for each in places] == [("cpu", 0), ("cpu", 0)]
        assert "FOREBAY_WORKER__CPUS" not in places[0].environment()


def test_a_model_can_ask_for_processors() -> None:
    places = place([_spec("a", cpus=5), _spec("b")], _machine(cpus=8))
    assert _where(places) == {"a": "cpu 0-4", "b": "cpu 5-7"}
    with pytest.raises(PlacementError, match="a, b: 9 cpus are wanted, 8 are here"):
        place([_spec("a", cpus=5), _spec("b", cpus=4)], _machine(cpus=8))


def test_a_quota_gives_threads_and_no_processors_of_ones_own() -> None:
    places = place([_spec("a"), _spec("b")], _machine(cpus=64, count=8))
    assert [(each.where, each.threads) for each in places] == [("cpu", 4), ("cpu", 4)]


def test_ranges() -> None:
    assert ranges((8, 0, 1, 2, 10)) == "0-2,8,10"
