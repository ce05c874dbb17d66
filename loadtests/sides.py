"""Sides of a benchmark that take turns: one of them runs, the processes of others stand still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import psutil

from loadtests.lab import Child


def tree(child: Child) -> list[psutil.Process]:
    """A side's process and all that it has started."""
    root = psutil.Process(child.process.pid)
    return [root, *root.children(recursive=True)]


def spent_s(processes: Sequence[psutil.Process]) -> float:
    """CPU time these processes have used so far."""
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


@contextlib.contextmanager
def stopped(child: Child) -> Iterator[None]:
    """The processes of a side don't run meanwhile, so that being idle costs the others nothing."""
    processes = tree(child)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
