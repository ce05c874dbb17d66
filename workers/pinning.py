"""Fixes a worker's threads before any numeric library is loaded."""

from __future__ import annotations

import os

from config.settings import Settings


def pin(settings: Settings) -> None:
    """Set what torch and its friends read at import; devices come by `CUDA_VISIBLE_DEVICES`."""
    if settings.worker.threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(settings.worker.threads)
    # Threads that wait for each other sleep instead of spinning. Spinning gains nothing measurable
    # on an idle machine and costs a factor of ten and more where another process wants the core
    # (docs/decisions/0005).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # One process holds one model: tokenisers need no threads of their own, and no one phones home.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
