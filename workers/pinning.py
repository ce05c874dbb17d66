"""Fixes a worker's threads before any numeric library is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from config.settings import Settings

#: Processors of this process before anything was bound; empty where the system can't say.
_PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(settings: Settings) -> None:
    """Set what torch and its friends read at import; devices come by `CUDA_VISIBLE_DEVICES`."""
    if settings.worker.threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(settings.worker.threads)
    # Threads that wait for each other spin for a fraction of a millisecond, which the operations of
    # a step need, and then sleep. Each keeps to a processor of its own, or the kernel wakes two on
    # the same one (docs/decisions/0005).
    if "OMP_WAIT_POLICY" not in os.environ and _has_all_processors(settings):
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # One process holds one model: tokenisers need no threads of their own, and no one phones home.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def unbind() -> None:
    """Let this thread, and those it starts from now on, run anywhere again.

    With `OMP_PROC_BIND` the import of torch binds the thread it happens in to one processor.
    Threads that compute are bound when they first do.
    """
    if _PROCESSORS:
        os.sched_setaffinity(0, _PROCESSORS)


def _has_all_processors(settings: Settings) -> bool:
    """Whether a thread can be given to each processor, and none is needed to feed a device.

    Several workers with fewer threads would all be bound to the first processors.
    """
    if not _PROCESSORS or Path("/dev/nvidiactl").exists():
        return False
    return (settings.worker.threads or len(_PROCESSORS)) == len(_PROCESSORS)
