"""What people see: tables, numbers, progress; and the one way JSON is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def stdout() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Progress and remarks; never mixed into output that a script reads."""
    return Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One document, indented for people, on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str, title: str | None = None
) -> None:
    """A table on stdout, or `empty` when it has no rows; `name>` makes a column right-aligned."""
    kept = [[show(cell) for cell in row] for row in rows]
    if not kept:
        click.echo(empty)
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(
            column.removesuffix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in kept:
        table.add_row(*row)
    console = stdout()
    if not sys.stdout.isatty():
        # A pipe has no width; nothing may be folded there.
        console = Console(highlight=False, markup=False, emoji=False, width=1000)
    console.print(table)


def show(cell: Any) -> str:
    """A cell as text; `-` for what isn't known. Control characters can't drive the terminal."""
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    text = str(cell)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def duration(milliseconds: float | None) -> str:
    """`340 ms`, `2.1 s`, `5 min 02 s`, `3 h 10 min`."""
    if milliseconds is None:
        return "-"
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[min(int(rank), len(ordered)) - 1]
