"""Fixes a worker's threads before any numeric library is loaded."""

from __future__ import annotations

import os

from config.settings import Settings

#: Processors of this process before anything was bound; empty where the system can't say.
_PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(settings: Settings) -> None:
    """Set what torch and its friends read at import; devices come by `CUDA_VISIBLE_DEVICES`."""
    if settings.worker.threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(settings.worker.threads)
    # Threads that wait for each other sleep: other processes want these processors too. Who has a
    # machine for one worker alone may bind and spin instead (docs/decisions/0005).
    if "OMP_PROC_BIND" not in os.environ:
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
