"""The data directory of `forebay up`: what lies where in it, its lock and its secrets."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class DataDirBusyError(Exception):
    """Another `forebay up` runs on this directory."""

    def __init__(self, root: Path, pid: str) -> None:
        super().__init__(f"{root} is in use by another forebay up (pid {pid or 'unknown'})")
        self.pid = pid


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Made once per data directory."""

    pepper: str
    redis_password: str

    @classmethod
    def generate(cls) -> Secrets:
        return cls(pepper=secrets.token_hex(32), redis_password=secrets.token_hex(24))


@dataclass(frozen=True, kw_only=True)
class AdminKey:
    """The key `forebay up` made for its owner."""

    id: str
    secret: str
    #: Digest under the pepper it was made with; another pepper makes the key worthless.
    digest: str


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What a running `forebay up` tells other commands."""

    pid: int
    api: str
    flower: str
    metrics: str
    admin_key: str
    redis_url: str
    database_url: str
    #: Settings of the stack as environment variables, for commands that talk to its parts.
    env: dict[str, str]


class DataDir:
    """Paths below one directory; nothing is written before `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.valkey = self.root / "valkey"
        self.metrics = self.root / "metrics"
        self.accounts = self.root / "accounts.db"
        self.catalogue = self.root / "models.toml"
        self._secrets = self.root / "secrets.json"
        self._admin_key = self.root / "admin_key.json"
        self._run = self.root / "run.json"
        self._lock = self.root / "lock"

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.accounts}"

    def create(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.valkey.mkdir(mode=0o700, exist_ok=True)
        self.metrics.mkdir(mode=0o700, exist_ok=True)

    def lock(self) -> int:
        """Take the directory for this process; the returned descriptor holds it until it closes.

        Raises `DataDirBusyError` with the pid of the holder.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode().strip()
            os.close(descriptor)
            raise DataDirBusyError(self.root, pid) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return descriptor

    def secrets(self) -> Secrets:
        """The secrets of this directory, made at the first call."""
        known = self.known_secrets()
        if known is None:
            known = Secrets.generate()
            _write_private(self._secrets, json.dumps(asdict(known)))
        return known

    def known_secrets(self) -> Secrets | None:
        raw = _read_json(self._secrets)
        return _build(Secrets, raw)

    def admin_key(self) -> AdminKey | None:
        return _build(AdminKey, _read_json(self._admin_key))

    def keep_admin_key(self, key: AdminKey) -> None:
        _write_private(self._admin_key, json.dumps(asdict(key)))

    def write_run(self, run: RunFile) -> None:
        _write_private(self._run, json.dumps(asdict(run), indent=1) + "\n")

    def remove_run(self) -> None:
        self._run.unlink(missing_ok=True)

    def run(self) -> RunFile | None:
        """What the running stack says about itself; None when none runs here."""
        run = _build(RunFile, _read_json(self._run))
        return run if run is not None and self._is_locked() else None

    def _is_locked(self) -> bool:
        # The lock, not the pid, tells whether the writer lives: pids are used again.
        try:
            descriptor = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def _build(kind: type[T], raw: Any) -> T | None:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(raw, dict) or not names <= raw.keys():
        return None
    return kind(**{name: raw[name] for name in names})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_private(path: Path, content: str) -> None:
    """Replace a file in one step; only its owner can ever read it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
