"""Sides of a benchmark that take turns: one of them runs, the processes of others stand still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import psutil

from loadtests.lab import Child


def tree(child: Child) -> list[psutil.Process]:
    """A side's process and all that it has started."""
    root = psutil.Process(child.process.pid)
    return [root, *root.children(recursive=True)]


def cpu_times_s(child: Child) -> dict[int, float]:
    """CPU time each process of a side has used so far, by its id."""
    times = {}
    for process in tree(child):
        # Short-lived ones may end at any time, e.g. a rewrite of Valkey's log.
        with contextlib.suppress(psutil.NoSuchProcess):
            times[process.pid] = float(sum(process.cpu_times()[:2]))
    return times


def spent_s(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU time of the processes that were there all along."""
    return sum(after[pid] - before[pid] for pid in before.keys() & after.keys())


@contextlib.contextmanager
def stopped(*children: Child) -> Iterator[None]:
    """The processes of these sides don't run meanwhile: being idle, they would cost the others."""
    processes = [process for child in children for process in tree(child)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
