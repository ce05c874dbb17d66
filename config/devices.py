"""What this machine computes with: NVIDIA devices by NVML, processors by affinity and quota.

Nothing here starts CUDA: devices are named by UUID, as `CUDA_VISIBLE_DEVICES` takes them, before
any process that computes is started. A machine without NVIDIA's library is a CPU machine; one
whose driver answers with an error is broken, and is not silently used without its devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

#: Bits of a word of NVML's processor masks.
_WORD = 64
_MIB = 1024 * 1024
#: A number of processors that no machine has.
_UNLIMITED = 1 << 20


class DeviceError(Exception):
    """The machine's devices can't be used; the message is one line, fit to be printed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or one MIG instance of it."""

    #: `GPU-…` or `MIG-…`, as `CUDA_VISIBLE_DEVICES` takes it.
    uuid: str
    #: Of the GPU, in the order of the PCI bus.
    index: int
    name: str
    memory_mib: int
    mig: bool = False
    #: Processors on its side of the machine; empty where the driver can't say.
    cpus: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What may be computed with here."""

    devices: tuple[Device, ...] = ()
    #: Processors of this process, those of one core side by side.
    cpus: tuple[int, ...] = ()
    #: How many of them it may keep busy at once.
    cpu_count: int = 1
    #: Devices that are there and can't be used, and why.
    problems: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A device's gauges; None is what it doesn't tell (MIG instances tell little)."""

    uuid: str
    index: int
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    #: Part of the last sample period in which a kernel ran.
    utilisation: float | None = None
    temperature_c: int | None = None


def discover(
    nvml: Any = None, environ: Mapping[str, str] | None = None, *, gpus: bool = True
) -> Machine:
    """The devices and processors that this process may use; without `gpus` processors only.

    `nvml` is the module `pynvml`, or one like it. An own `CUDA_VISIBLE_DEVICES` narrows the
    choice. Raises `DeviceError` when the driver is broken or that variable names no device.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    devices: list[Device] = []
    if gpus:
        with session(nvml) as library:
            if library is not None:
                devices = list(_devices(library, problems))
                allowed = environ.get("CUDA_VISIBLE_DEVICES")
                if allowed is not None:
                    devices = _narrowed(devices, allowed)
    cpus = processors()
    return Machine(
        devices=tuple(devices),
        cpus=cpus,
        cpu_count=min(len(cpus), quota()),
        problems=tuple(problems),
    )


@contextmanager
def session(nvml: Any = None) -> Iterator[Any]:
    """NVML, started; None where there is no NVIDIA driver. Raises `DeviceError`."""
    library = nvml
    if library is None:
        try:
            library = import_module("pynvml")
        except ImportError:
            yield None
            return
    absent = (library.NVML_ERROR_LIBRARY_NOT_FOUND, library.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        if error.value in absent:
            yield None
            return
        raise DeviceError(f"the NVIDIA driver answers: {error}") from None
    try:
        yield library
    finally:
        with suppress(library.NVMLError):
            library.nvmlShutdown()


def handles(nvml: Any) -> Iterator[tuple[int, Any]]:
    """(index of the GPU, handle) of all GPUs and MIG instances that answer."""
    problems: list[str] = []
    for index, handle in _gpus(nvml, problems):
        instances = _instances(nvml, handle)
        if instances is None:
            yield index, handle
        else:
            yield from ((index, instance) for instance in instances)


def read(nvml: Any, index: int, handle: Any) -> Reading:
    """The gauges of one device, as far as it tells them."""
    memory: Any = None
    utilisation = temperature = None
    with suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    with suppress(nvml.NVMLError):
        utilisation = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    with suppress(nvml.NVMLError):
        temperature = int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    return Reading(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        index=index,
        memory_bytes=None if memory is None else int(memory.total),
        memory_used_bytes=None if memory is None else int(memory.used),
        utilisation=utilisation,
        temperature_c=temperature,
    )


def _devices(nvml: Any, problems: list[str]) -> Iterator[Device]:
    for index, handle in _gpus(nvml, problems):
        try:
            instances = _instances(nvml, handle)
            if instances is None:
                yield _device(nvml, index, handle, mig=False, near=_near(nvml, handle))
                continue
            if not instances:
                problems.append(f"GPU {index} is in MIG mode and has no instances")
            near = _near(nvml, handle)
            for instance in instances:
                yield _device(nvml, index, instance, mig=True, near=near)
        except nvml.NVMLError as error:
            problems.append(f"GPU {index}: {error}")


def _gpus(nvml: Any, problems: list[str]) -> Iterator[tuple[int, Any]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            # One that fell off the bus; the others work on.
            problems.append(f"GPU {index}: {error}")


def _instances(nvml: Any, handle: Any) -> list[Any] | None:
    """The GPU's MIG instances; None unless it is in MIG mode."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return None
    if not current:
        return None
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        # Places without an instance answer "not found".
        with suppress(nvml.NVMLError):
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
    return found


def _device(nvml: Any, index: int, handle: Any, *, mig: bool, near: frozenset[int]) -> Device:
    return Device(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_mib=int(nvml.nvmlDeviceGetMemoryInfo(handle).total) // _MIB,
        mig=mig,
        cpus=near,
    )


def _near(nvml: Any, handle: Any) -> frozenset[int]:
    words = math.ceil((os.cpu_count() or 1) / _WORD)
    try:
        mask = nvml.nvmlDeviceGetCpuAffinity(handle, words)
    except nvml.NVMLError:
        return frozenset()
    return frozenset(
        word * _WORD + bit for word in range(words) for bit in range(_WORD) if mask[word] >> bit & 1
    )


def _text(value: str | bytes) -> str:
    """NVML's older bindings answer with bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _narrowed(devices: list[Device], allowed: str) -> list[Device]:
    """Those that `CUDA_VISIBLE_DEVICES` names, in its order. Raises `DeviceError`."""
    chosen: list[Device] = []
    for wanted in filter(None, (part.strip() for part in allowed.split(","))):
        if wanted == "-1":
            break
        if wanted.isdecimal():
            # Of a GPU in MIG mode, CUDA takes the first instance.
            found = [device for device in devices if device.index == int(wanted)][:1]
        else:
            found = [device for device in devices if device.uuid.startswith(wanted)]
        if len(found) != 1:
            raise DeviceError(f"CUDA_VISIBLE_DEVICES={allowed}: {wanted!r} is not one device here")
        chosen += [device for device in found if device not in chosen]
    return chosen


def processors(root: Path = Path("/sys/devices/system/cpu")) -> tuple[int, ...]:
    """Processors this process may run on; neighbours share a core, then a socket."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0), key=lambda cpu: _whereabouts(root, cpu)))


def _whereabouts(root: Path, cpu: int) -> tuple[int, int, int]:
    topology = root / f"cpu{cpu}" / "topology"
    try:
        package = int((topology / "physical_package_id").read_text())
        return package, int((topology / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu


def quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors' worth of time that the control group allows, at least 1."""
    with suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        if limit != "max":
            return max(1, math.ceil(int(limit) / int(period)))
        return _UNLIMITED
    with suppress(OSError, ValueError):
        limit_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        if limit_us > 0:
            period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
            return max(1, math.ceil(limit_us / period_us))
    return _UNLIMITED
