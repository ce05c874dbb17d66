"""The nginx of `infra/nginx/forebay.conf` on free ports, in front of API processes of a test."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from loadtests.lab import ROOT

CONFIG = ROOT / "infra" / "nginx" / "forebay.conf"
#: Folders below which nginx keeps what it can't hold in memory, all of them relative to its own.
_KEPT = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def program() -> str | None:
    """Where nginx is; Debian keeps it outside an ordinary user's PATH."""
    return shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def render(text: str, *, listen: int, replicas: Sequence[int], workers: int = 2) -> str:
    """The shipped configuration with other addresses and nothing else changed.

    Raises `ValueError` when it no longer has the lines that are to be changed.
    """
    servers = "\n".join(
        f"        server 127.0.0.1:{port} max_fails=2 fail_timeout=5s;" for port in replicas
    )
    kept = "\n".join(f"    {name}_temp_path {name}_temp;" for name in _KEPT)
    # Workers of a master that root started would not get into a folder that only root may enter.
    user = "user root;\n" if os.geteuid() == 0 else ""
    changes = (
        (r"(?:^ +server 127\.0\.0\.1:.*;\n)+", servers + "\n"),
        (r"listen 8080", f"listen 127.0.0.1:{listen}"),
        (r"^worker_processes auto;", f"{user}worker_processes {workers};"),
        (r"^http \{\n", f"http {{\n{kept}\n"),
    )
    for pattern, replacement in changes:
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"the configuration has {found} places like {pattern}")
    return text


def command(folder: Path, *, listen: int, replicas: Sequence[int]) -> list[str]:
    """What to run in the foreground, its configuration written into `folder`."""
    path = program()
    if path is None:
        raise FileNotFoundError("nginx is not installed")
    config = folder / "nginx.conf"
    config.write_text(render(CONFIG.read_text(), listen=listen, replicas=replicas))
    return [path, "-p", str(folder), "-c", str(config), "-e", "stderr", "-g", "daemon off;"]
