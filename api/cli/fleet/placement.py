"""Which worker runs on which devices and processors: a machine and a catalogue in, places out.

Groups of devices come first, as they are the hardest to find; then models with a device of their
own; then small ones, which share; then those that take what is left. Without devices everything
runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from config.catalogue import ModelSpec
from config.devices import Device, Machine
from config.settings import SettingsError

#: Part of a device's memory that workers which share it may take; CUDA itself takes some for each.
_SHARED_PART = 0.95
#: Threads of a worker whose model computes on a device: they tokenise and launch kernels.
_DEVICE_THREADS = 8


class PlacementError(SettingsError):
    """The catalogue doesn't fit the machine; the message names the model."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one worker runs."""

    #: Of the worker: the model's name, with a number where there are several.
    name: str
    model: str
    #: The catalogue's word for what runs it.
    engine: str = "transformers"
    #: Empty: on the CPU.
    devices: tuple[Device, ...] = ()
    #: Memory it may take of its device; 0: all.
    device_memory_mib: int = 0
    #: Processors it is bound to; empty: it runs on any.
    cpus: tuple[int, ...] = ()
    #: 0: torch decides.
    threads: int = 0

    @property
    def where(self) -> str:
        """`GPU 0+1`, `GPU 2 (MIG-…)`, `cpu 0-3`, `cpu`."""
        if self.devices:
            return "GPU " + "+".join(
                f"{device.index} ({device.uuid[:12]}…)" if device.mig else str(device.index)
                for device in self.devices
            )
        return f"cpu {ranges(self.cpus)}" if self.cpus else "cpu"

    def environment(self) -> dict[str, str]:
        """What its process is started with. torch reads it at import, so it can't come later."""
        variables = {
            # By UUID: numbers change when a device is lost or CUDA orders them by speed.
            "CUDA_VISIBLE_DEVICES": ",".join(device.uuid for device in self.devices),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "FOREBAY_WORKER__PLACE": self.where,
        }
        if self.cpus:
            variables["FOREBAY_WORKER__CPUS"] = ranges(self.cpus)
        if self.threads:
            variables["FOREBAY_WORKER__THREADS"] = str(self.threads)
        if self.device_memory_mib:
            variables["FOREBAY_WORKER__DEVICE_MEMORY_MIB"] = str(self.device_memory_mib)
        return variables


def place(models: Sequence[ModelSpec], machine: Machine, *, bind: bool = True) -> list[Place]:
    """A place for every worker of the models, in their order.

    With `bind` workers on the CPU get processors of their own where there are two or more for
    each; otherwise they all run on any, as on a machine that other processes share (decision
    0005). Raises `PlacementError` when there is no room for one of them.
    """
    board = _Board(machine.devices)
    on_cpu = [spec for spec in models if not spec.devices or not machine.devices]
    for spec in on_cpu:
        if spec.devices > 1:
            raise PlacementError(f"{spec.name} wants {spec.devices} devices; there are none here")
    on_devices = [spec for spec in models if spec not in on_cpu]
    taken: dict[str, list[tuple[Device, ...]]] = {spec.name: [] for spec in models}
    for spec in sorted(on_devices, key=_difficulty):
        for _ in range(spec.workers or 1):
            taken[spec.name].append(board.take(spec))
    greedy = [spec for spec in on_devices if spec.workers == 0]
    while greedy:
        # In turns, so that none of them gets all of the rest.
        for spec in list(greedy):
            try:
                taken[spec.name].append(board.take(spec))
            except PlacementError:
                greedy.remove(spec)
    places: list[Place] = []
    for spec in models:
        groups = taken[spec.name] or [()] * (spec.workers or 1)
        for number, devices in enumerate(groups, 1):
            places.append(
                Place(
                    name=spec.name if len(groups) == 1 else f"{spec.name}-{number}",
                    model=spec.name,
                    engine=spec.engine,
                    devices=devices,
                    device_memory_mib=spec.device_memory_mib if devices else 0,
                )
            )
    near = _near_devices(places, machine)
    return _on_processors(near, {spec.name: spec.cpus for spec in models}, machine, bind=bind)


def ranges(cpus: Sequence[int]) -> str:
    """Numbers as `0-3,8`."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _difficulty(spec: ModelSpec) -> tuple[int, bool, bool, int]:
    """Groups, whole devices, shared ones; those that take the rest after those that are counted."""
    return (-spec.devices, bool(spec.device_memory_mib), not spec.workers, -spec.device_memory_mib)


class _Board:
    """What is still free of each device."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._free = list(devices)
        #: Memory left on devices that are shared.
        self._shared: dict[Device, float] = {}

    def take(self, spec: ModelSpec) -> tuple[Device, ...]:
        if spec.devices > 1:
            return self._group(spec)
        if spec.device_memory_mib:
            return self._part(spec)
        if not self._free:
            raise PlacementError(f"{spec.name} wants a device of its own; none is left")
        return (self._free.pop(0),)

    def _group(self, spec: ModelSpec) -> tuple[Device, ...]:
        # CUDA shows a process one MIG instance at most; and a group is as fast as its slowest.
        kinds: dict[tuple[str, int], list[Device]] = {}
        for device in self._free:
            if not device.mig:
                kinds.setdefault((device.name, device.memory_mib), []).append(device)
        most = max(kinds.values(), key=len, default=[])
        if len(most) < spec.devices:
            raise PlacementError(
                f"{spec.name} wants {spec.devices} whole devices of one kind; {len(most)} are left"
            )
        # The smallest kind that has enough, so that larger groups still find theirs. Neighbours on
        # the bus are mostly the ones that are wired together.
        fitting = min((k for k in kinds.values() if len(k) >= spec.devices), key=len)
        group = _neighbours(fitting, spec.devices)
        self._free = [device for device in self._free if device not in group]
        return group

    def _part(self, spec: ModelSpec) -> tuple[Device, ...]:
        roomy = [d for d, left in self._shared.items() if left >= spec.device_memory_mib]
        if roomy:
            # The fullest that has room.
            device = min(roomy, key=lambda each: self._shared[each])
        else:
            fitting = [
                d for d in self._free if d.memory_mib * _SHARED_PART >= spec.device_memory_mib
            ]
            if not fitting:
                raise PlacementError(
                    f"{spec.name} wants {spec.device_memory_mib} MiB of a device; "
                    "none has so much left"
                )
            device = min(fitting, key=lambda each: each.memory_mib)
            self._free.remove(device)
            self._shared[device] = device.memory_mib * _SHARED_PART
        self._shared[device] -= spec.device_memory_mib
        return (device,)


def _neighbours(devices: Sequence[Device], count: int) -> tuple[Device, ...]:
    """`count` devices side by side, and on one side of the machine where that can be."""
    windows = [tuple(devices[i : i + count]) for i in range(len(devices) - count + 1)]
    return min(
        windows,
        key=lambda window: (
            len({device.cpus for device in window}),
            window[-1].index - window[0].index,
            window[0].index,
        ),
    )


def _near_devices(places: Sequence[Place], machine: Machine) -> list[Place]:
    """Workers on devices run on their devices' side of the machine, where it has sides."""
    placed = []
    for each in places:
        if not each.devices:
            placed.append(each)
            continue
        near = frozenset.union(*(device.cpus for device in each.devices)) & frozenset(machine.cpus)
        sharing = sum(1 for other in places if other.devices)
        threads = max(1, min(_DEVICE_THREADS, machine.cpu_count // sharing))
        bound = near if near and len(near) < len(machine.cpus) else frozenset()
        placed.append(replace(each, cpus=tuple(sorted(bound)), threads=threads))
    return placed


def _on_processors(
    places: Sequence[Place], wanted: dict[str, int], machine: Machine, *, bind: bool
) -> list[Place]:
    """Give the workers on the CPU processors of their own, if there are enough."""
    on_cpu = [each for each in places if not each.devices]
    asked = sum(wanted[each.model] for each in on_cpu)
    if asked > machine.cpu_count:
        names = ", ".join(dict.fromkeys(each.model for each in on_cpu if wanted[each.model]))
        raise PlacementError(f"{names}: {asked} cpus are wanted, {machine.cpu_count} are here")
    equal = [each for each in on_cpu if not wanted[each.model]]
    share, spare = divmod(machine.cpu_count - asked, len(equal)) if equal else (0, 0)
    if not bind or (equal and share < 2):
        return [
            replace(each, threads=wanted[each.model]) if each in on_cpu else each for each in places
        ]
    # Under a quota the processors aren't this process's own; a number of threads keeps to it.
    own = machine.cpu_count == len(machine.cpus)
    begin = 0
    placed = []
    for each in places:
        if each.devices:
            placed.append(each)
            continue
        count = wanted[each.model] or share + (1 if equal.index(each) < spare else 0)
        cpus = machine.cpus[begin : begin + count] if own else ()
        begin += count
        placed.append(replace(each, cpus=tuple(sorted(cpus)), threads=count))
    return placed
