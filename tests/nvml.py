"""A stand-in for `pynvml`: its functions on GPUs that a test describes, its errors included."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1024**3


class NVMLError(Exception):
    """As in pynvml: raised with one of its numbers."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {
            3: "Not Supported",
            6: "Not Found",
            9: "Driver Not Loaded",
            12: "NVML Shared Library Not Found",
            15: "GPU is lost",
            18: "Driver/library version mismatch",
        }[self.value]


@dataclass
class Gpu:
    """One handle: a GPU or a MIG instance."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    memory: int = 80 * GIB
    used: int = 2 * GIB
    #: Processors near it, as a mask.
    near: int = 0
    #: Places for MIG instances, some empty; None: not in MIG mode.
    instances: list[Gpu | None] | None = None
    #: Old ones know no MIG mode.
    knows_mig: bool = True
    lost: bool = False


@dataclass
class FakeNvml:
    """What `pynvml` is to the code: a module."""

    gpus: list[Gpu]
    #: What `nvmlInit` fails with.
    broken: int = 0
    opened: int = 0
    NVML_ERROR_LIBRARY_NOT_FOUND: int = 12
    NVML_ERROR_DRIVER_NOT_LOADED: int = 9
    NVML_TEMPERATURE_GPU: int = 0
    NVMLError: Any = field(default=NVMLError)

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError(self.broken)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.opened
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if self.gpus[index].lost:
            raise NVMLError(15)
        return self.gpus[index]

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        if not gpu.knows_mig:
            raise NVMLError(3)
        mode = int(gpu.instances is not None)
        return mode, mode

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return len(gpu.instances or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, number: int) -> Gpu:
        found = (gpu.instances or [])[number]
        if found is None:
            raise NVMLError(6)
        return found

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> bytes:
        return gpu.name.encode()

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(total=gpu.memory, used=gpu.used)

    def nvmlDeviceGetCpuAffinity(self, gpu: Gpu, words: int) -> list[int]:
        if gpu.uuid.startswith("MIG-"):
            raise NVMLError(3)
        return [(gpu.near >> 64 * word) & (1 << 64) - 1 for word in range(words)]

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> SimpleNamespace:
        if gpu.uuid.startswith("MIG-"):
            raise NVMLError(3)
        return SimpleNamespace(gpu=73, memory=10)

    def nvmlDeviceGetTemperature(self, gpu: Gpu, _sensor: int) -> int:
        if gpu.uuid.startswith("MIG-"):
            raise NVMLError(3)
        return 61


def eight() -> FakeNvml:
    """A server with two sides, four GPUs on each."""
    return FakeNvml(
        [Gpu(f"GPU-{i}0000000-aaaa", near=0b0011 if i < 4 else 0b1100) for i in range(8)]
    )


def with_mig() -> FakeNvml:
    """A whole GPU, one cut in two with an empty place between, one in MIG mode and not cut."""
    parts: list[Gpu | None] = [
        Gpu("MIG-1111", name="NVIDIA H100 MIG 3g.40gb", memory=40 * GIB, used=GIB),
        None,
        Gpu("MIG-2222", name="NVIDIA H100 MIG 3g.40gb", memory=40 * GIB, used=GIB),
    ]
    return FakeNvml([Gpu("GPU-whole"), Gpu("GPU-cut", instances=parts), Gpu("GPU-c", instances=[])])
