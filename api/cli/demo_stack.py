"""The stack a demo runs on: `forebay up` as a process of its own, in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from api.cli.failures import CommandError
from api.cli.plan import catalogue_toml, child_environment, python
from api.cli.supervisor import die_with_parent
from config.catalogue import ModelSpec

#: Of the caller's settings, those a demo honours: where weights are and how the engine computes.
_HONOURED = ("FOREBAY_MODELS__CACHE_DIR", "FOREBAY_WORKER__", "FOREBAY_SIMULATED__")
#: Longest wait for everything to be ready.
_START_S = 120.0
#: `forebay up` promises 15 s.
_STOP_S = 20.0


@dataclass(frozen=True)
class Addresses:
    """What `forebay up` said when it was ready."""

    api: str
    flower: str
    metrics: str
    admin_key: str


class DemoStack:
    """Starts, watches and ends one `forebay up`."""

    def __init__(self, models: Mapping[str, ModelSpec], *, engine: str, keep: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forebay-demo-"))
        self.data_dir = self.folder / "data"
        self.log = self.folder / "up.log"
        self._keep = keep
        self._process: subprocess.Popen[bytes] | None = None
        self._engine = engine
        catalogue = self.folder / "models.toml"
        catalogue.write_text(catalogue_toml(tuple(models.values())))
        self.environment = {
            name: value
            for name, value in child_environment(
                {"FOREBAY_MODELS__CATALOGUE": str(catalogue)}
            ).items()
            if not name.startswith("FOREBAY_")
            or name == "FOREBAY_MODELS__CATALOGUE"
            or name.startswith(_HONOURED)
        }

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> Addresses:
        """Raises `CommandError` with the end of the log when it doesn't come up."""
        self._process = self._spawn()
        line = await self._first_line(self._process)
        if not line:
            raise CommandError("the stack did not start", details=self.tail())
        said = json.loads(line)
        return Addresses(said["api"], said["flower"], said["metrics"], said["admin_key"])

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            # Not asyncio's: that kills what still runs when the loop ends, also what is kept.
            return subprocess.Popen(
                [
                    *python("api.cli", "up", "--data-dir", str(self.data_dir)),
                    *("--api-port", "0", "--flower-port", "0", "--metrics-port", "0"),
                    *("--engine", self._engine),
                ],
                # Not the caller's folder: its `.env` is about another stack.
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if self._keep else die_with_parent(signal.SIGTERM),
            )

    async def _first_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        reading = asyncio.create_task(asyncio.to_thread(process.stdout.readline))
        done, _ = await asyncio.wait([reading], timeout=_START_S)
        if not done:
            # Its end ends the reading too.
            process.kill()
            await reading
            raise CommandError(f"the stack was not ready after {_START_S:g} s", details=self.tail())
        return reading.result()

    async def ended(self) -> None:
        """Wait until the stack ends by itself, which is an error. Raises `CommandError`."""
        assert self._process is not None
        gone = asyncio.Event()
        watched = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(watched, gone.set)
        try:
            await gone.wait()
        finally:
            asyncio.get_running_loop().remove_reader(watched)
            os.close(watched)
        status = self._process.wait()
        raise CommandError(f"the stack ended with status {status}", details=self.tail())

    async def stop(self) -> float:
        """End it if it runs; returns how long that took. Raises `CommandError`."""
        if self._process is None or self._process.poll() is not None:
            return 0.0
        began = time.monotonic()
        self._process.terminate()
        try:
            status = await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise CommandError(f"the stack did not end within {_STOP_S:g} s") from None
        if status != 0:
            raise CommandError(f"the stack ended with status {status}", details=self.tail())
        return time.monotonic() - began

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        with suppress(OSError):
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 16_384))
                last = file.read().decode(errors="replace").splitlines()
            return "\n".join(last[-lines:])
        return ""
