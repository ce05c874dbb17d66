"""A primary, a replica and a Sentinel that watches over them, as real processes."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import redis

from tests.conftest import free_port, missing
from tests.integration.worker_lab import until

SERVICE = "forebay"
#: Silence after which the Sentinel takes the primary for dead (ms).
DOWN_AFTER_MS = 500
#: Replication logs in as a user of its own, so that a test can cut it off.
_USER = "user replicator on >replicate allkeys allchannels +@all"


class Node:
    """One Redis; it comes back on its port with its data."""

    def __init__(self, binary: str, folder: Path, primary: Node | None = None) -> None:
        self.port = free_port()
        self.client = redis.Redis(port=self.port, protocol=2)
        folder.mkdir()
        config = folder / "redis.conf"
        lines = [
            f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', _USER,
            "masteruser replicator", "masterauth replicate", "repl-diskless-sync-delay 0",
            "appendonly yes",
        ]  # fmt: skip
        if primary is not None:
            lines.append(f"replicaof 127.0.0.1 {primary.port}")
        config.write_text("\n".join(lines) + "\n")
        self._command = [binary, str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, replica_of: Node | None = None) -> None:
        place = ["--replicaof", f"127.0.0.1 {replica_of.port}"] if replica_of else []
        self._process = _run([*self._command, *place])
        until(self._answers, "a server answers")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @property
    def role(self) -> str:
        with suppress(redis.RedisError):
            return str(self.client.role()[0].decode())
        return ""

    def _answers(self) -> bool:
        with suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def close(self) -> None:
        self.client.close()
        self.kill()


class Cluster:
    """`url` names an address where nobody listens before the Sentinel's."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            missing("redis-server")
        self.primary = Node(str(binary), folder / "one")
        self.replica = Node(str(binary), folder / "two", self.primary)
        port = free_port()
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        self._sentinel_command = [str(binary), str(config), "--sentinel"]
        self._sentinel: subprocess.Popen[bytes] | None = None
        self.sentinel = redis.Redis(port=port, protocol=2)
        self.url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/{SERVICE}/0"

    def start(self) -> None:
        self.primary.start()
        self.replica.start()
        until(self._replicated, "the replica confirms writes")
        self._sentinel = _run(self._sentinel_command)
        until(self._watched, "the Sentinel knows of the replica")

    def swap(self) -> None:
        """Exchange the roles by hand, at once: unlike a failover this closes no connection."""
        self.replica.client.replicaof("NO", "ONE")
        self.primary.client.replicaof("127.0.0.1", str(self.replica.port))
        new = ("127.0.0.1", self.replica.port)
        self.sentinel.execute_command("SENTINEL", "REMOVE", SERVICE)
        self.sentinel.execute_command("SENTINEL", "MONITOR", SERVICE, *new, 1)

    def _replicated(self) -> bool:
        """A replica that is listed may still be at its first copy, and confirm nothing."""
        self.primary.client.set("copied", 1)
        return int(self.primary.client.wait(1, 500)) == 1

    def _watched(self) -> bool:
        with suppress(redis.RedisError):
            # As a rule it asks every 10 s how its servers are.
            self.sentinel.execute_command("SENTINEL", "DEBUG", "info-period", "200")
            for each in self.sentinel.execute_command("SENTINEL", "REPLICAS", SERVICE):
                state = dict(zip(each[::2], each[1::2], strict=True))
                return (state[b"flags"], state[b"master-link-status"]) == (b"slave", b"ok")
        return False

    def close(self) -> None:
        self.sentinel.close()
        if self._sentinel is not None:
            self._sentinel.kill()
            self._sentinel.wait(10)
        self.replica.close()
        self.primary.close()


def _run(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
