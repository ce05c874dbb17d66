"""An S3-compatible server of its own process: moto's, which keeps objects in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from tests.conftest import free_port

KEY, SECRET, BUCKET = "forebay", "a secret of the tests", "files"


def is_installed() -> bool:
    return all(util.find_spec(name) for name in ("moto", "flask", "flask_cors"))


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Its address; it has the bucket `BUCKET`. `folder` is for its log."""
    port = free_port()
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _make_bucket(endpoint, process)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def _make_bucket(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urlopen(Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=10).close()
        except URLError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
