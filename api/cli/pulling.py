"""Fetching models through `python -m workers pull`, in a process of its own (torch lives there)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from api.cli.console import stderr
from api.cli.merged_log import LineSplitter
from api.cli.supervisor import die_with_parent

#: (model, stage, done part of the stage)
Report = Callable[[str, str, float], None]

_PULL = (sys.executable, "-P", "-m", "workers", "pull")


class PullError(Exception):
    """A model can't be had; the message is one line."""


async def pull(
    names: Sequence[str],
    environment: Mapping[str, str],
    *,
    report: Report,
    command: Sequence[str] = _PULL,
) -> None:
    """Fetch and convert what isn't in the model cache yet. Raises `PullError`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        *names,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        splitter = LineSplitter()
        while chunk := await process.stdout.read(65536):
            for line in splitter.feed(chunk):
                _tell(line, report)
        status = await process.wait()
        said = (await errors).decode(errors="replace").strip().splitlines()
    finally:
        errors.cancel()
        # Also what it started itself (a download), when this was cancelled.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if status != 0:
        raise PullError(said[-1] if said else f"fetching models ended with status {status}")


def _tell(line: bytes, report: Report) -> None:
    try:
        step = json.loads(line)
        report(str(step["model"]), str(step["stage"]), float(step["fraction"]))
    except (ValueError, KeyError, TypeError):
        # Not a progress line.
        return


@contextmanager
def progress_bars() -> Iterator[Report]:
    """A bar per model on stderr; on a pipe, a line when a stage begins."""
    console = stderr()
    stages: dict[str, str] = {}
    if not console.is_terminal:

        def say(model: str, stage: str, fraction: float) -> None:
            if stages.get(model) != stage:
                stages[model] = stage
                console.print(f"{model}: {stage}", soft_wrap=True, markup=False)

        yield say
        return
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:

        def draw(model: str, stage: str, fraction: float) -> None:
            if model not in bars:
                bars[model] = progress.add_task(model, total=1.0)
            progress.update(bars[model], description=f"{model}: {stage}", completed=fraction)

        yield draw
