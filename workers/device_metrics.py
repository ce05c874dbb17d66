"""Gauges of the devices this process may use, read from NVML now and then. Free of torch."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from config import devices
from config.devices import DeviceError
from config.logs import get_logger

log = get_logger(__name__)

#: Pause between two readings (s); a reading costs the driver under a millisecond.
EVERY_S = 5.0

#: What was registered: a registry may have only one of each gauge.
_gauges: WeakKeyDictionary[CollectorRegistry, dict[str, Gauge]] = WeakKeyDictionary()


class DeviceMetrics:
    """Reads in a thread of its own: a driver that hangs holds up nothing else.

    `visible` is `CUDA_VISIBLE_DEVICES`: None is every device, empty none. Without a device or a
    driver no thread runs and no gauge shows.
    """

    def __init__(
        self,
        visible: str | None,
        *,
        registry: CollectorRegistry = REGISTRY,
        nvml: Any = None,
        every_s: float = EVERY_S,
    ) -> None:
        self._visible = visible
        self._nvml = nvml
        self._every_s = every_s
        self._stopping = threading.Event()
        if registry not in _gauges:
            _gauges[registry] = _make(registry)
        self._gauges = _gauges[registry]
        self._thread = threading.Thread(target=self._loop, name="device-metrics", daemon=True)

    def start(self) -> None:
        if self._visible not in ("", "-1"):
            self._thread.start()

    def stop(self) -> None:
        """Returns at once: the thread may wait for a driver that never answers."""
        self._stopping.set()

    def _loop(self) -> None:
        try:
            with devices.session(self._nvml) as nvml:
                if nvml is None:
                    return
                while True:
                    self._read(nvml)
                    if self._stopping.wait(self._every_s):
                        return
        except DeviceError as error:
            log.warning("devices_not_read", reason=str(error))
        except Exception as error:
            # The gauges are a courtesy; work goes on without them.
            log.warning("devices_not_read", reason=f"{type(error).__name__}: {error}")

    def _read(self, nvml: Any) -> None:
        wanted = None if self._visible is None else self._visible.split(",")
        for index, handle in devices.handles(nvml):
            try:
                reading = devices.read(nvml, index, handle)
            except nvml.NVMLError:
                # It fell off the bus; the others are read on.
                continue
            if wanted is not None and not any(
                each == str(index) or reading.uuid.startswith(each) for each in wanted
            ):
                continue
            for name, value in (
                ("memory_bytes", reading.memory_bytes),
                ("memory_used_bytes", reading.memory_used_bytes),
                ("utilization_ratio", reading.utilisation),
                ("temperature_celsius", reading.temperature_c),
            ):
                if value is not None:
                    self._gauges[name].labels(str(index), reading.uuid).set(value)


def _make(registry: CollectorRegistry) -> dict[str, Gauge]:
    texts = {
        "memory_bytes": "Memory of the device.",
        "memory_used_bytes": "Memory of the device that is taken, by whomever.",
        "utilization_ratio": "Part of the last moment in which the device computed.",
        "temperature_celsius": "Temperature of the device.",
    }
    return {
        name: Gauge(
            f"forebay_workers_device_{name}",
            text,
            ("device", "uuid"),
            # Workers that share a device say the same of it.
            multiprocess_mode="livemax",
            registry=registry,
        )
        for name, text in texts.items()
    }
