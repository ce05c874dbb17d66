"""Baseline of `loadtests.queue_bench`: stock Celery on its stock Redis transport, all defaults.

`BASELINE_REDIS` names the broker; `BASELINE_RESULTS=1` stores results in the same Redis (ours are
stored always), `0` ignores them.
"""

from __future__ import annotations

import os
import time

import celery

_URL = os.environ["BASELINE_REDIS"]
_RESULTS = os.environ["BASELINE_RESULTS"] == "1"

app = celery.Celery("baseline", broker=_URL, backend=_URL if _RESULTS else None)
app.conf.update(task_ignore_result=not _RESULTS, broker_connection_retry_on_startup=True)


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(body: dict[str, object]) -> int:
    return 0


@app.task(name="nap")  # type: ignore[untyped-decorator]
def nap(milliseconds: float) -> float:
    """Sleep, and return when it began (Unix seconds)."""
    began = time.time()
    time.sleep(milliseconds / 1000)
    return began
