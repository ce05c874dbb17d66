"""Fixes a worker's processors, threads and devices before any numeric library is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping

from config.settings import Settings, SettingsError

#: Processors this process may use, as long as nothing else binds its threads; empty where the
#: system can't say.
_processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(settings: Settings) -> None:
    """Bind this process, and set what torch and its friends read at import.

    Devices come by `CUDA_VISIBLE_DEVICES`, in the environment this process was started with.
    Raises `SettingsError` when the machine hasn't the processors it shall run on.
    """
    global _processors
    if settings.worker.cpus:
        wanted = cpu_set(settings.worker.cpus)
        try:
            os.sched_setaffinity(0, wanted)
        except (AttributeError, OSError) as error:
            raise SettingsError(
                f"FOREBAY_WORKER__CPUS={settings.worker.cpus!r}: can't be bound there: {error}"
            ) from None
        _processors = wanted
    if settings.worker.threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(settings.worker.threads)
    # By number, devices are meant as NVML and nvidia-smi count them.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # Threads that wait for each other sleep: other processes want these processors too. Who has a
    # machine for one worker alone may bind and spin instead (docs/decisions/0005).
    if "OMP_PROC_BIND" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # One process holds one model: tokenisers need no threads of their own, and no one phones home.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def place_of(environ: Mapping[str, str]) -> str:
    """Where this process computes, as far as its environment says."""
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    if devices and devices != "-1":
        return f"GPU {devices}"
    return f"{len(_processors) or os.cpu_count()} cpus"


def cpu_set(text: str) -> set[int]:
    """`0-3,8` as numbers."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def unbind() -> None:
    """Let this thread, and those it starts from now on, run on all of the process's processors.

    With `OMP_PROC_BIND` the import of torch binds the thread it happens in to one processor.
    Threads that compute are bound when they first do.
    """
    if _processors:
        os.sched_setaffinity(0, _processors)
