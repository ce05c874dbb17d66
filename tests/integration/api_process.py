"""`python -m api` as a process of a test."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.apiserver import eventually
from tests.conftest import PATIENCE_S


class Process:
    """A running API process."""

    def __init__(self, env: dict[str, str], folder: Path, name: str) -> None:
        self.port = int(env["FOREBAY_API__PORT"])
        self.url = f"http://127.0.0.1:{self.port}"
        self._stdout, self._stderr = folder / f"{name}.out", folder / f"{name}.err"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api"], env=env, stdout=out, stderr=err
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    async def started(self) -> None:
        def look() -> bool:
            assert self.process.poll() is None, self.stderr
            return "api_started" in self.stderr

        await eventually(look)

    async def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)


@contextmanager
def running(env: dict[str, str], folder: Path, name: str = "api") -> Iterator[Process]:
    process = Process(env, folder, name)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)
