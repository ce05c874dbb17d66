"""What clients connect to: API processes, behind nginx when there are several, and one worker."""

from __future__ import annotations

from typing import Any

import psutil
import redis

from broker import keys
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests import nginx
from loadtests.lab import SERVER_CORE, Child, Lab, free_port, listening, python, until
from loadtests.stack import MODEL, api_env, create_key, worker_env

#: Records read in one round trip.
_BATCH = 500


class Front:
    """A stack of its own, with its own Valkey, accounts and simulated engine."""

    def __init__(self, lab: Lab, *, processes: int, slots: int, step_ms: float) -> None:
        self.label = "one API process" if processes == 1 else f"nginx, {processes} API processes"
        name = f"front{processes}"
        url = lab.redis(name=f"valkey-{name}")
        self._redis = redis.Redis.from_url(url)
        self.queue = RedisQueue(self._redis, Queue())
        folder = lab.folder / name
        folder.mkdir()
        env = api_env(url, folder)
        self.key = create_key(env, max_in_flight=4 * slots)
        ports = [free_port() for _ in range(processes)]
        self.apis = [
            lab.start(
                python("api"),
                name=f"{name}-api{index}",
                core=SERVER_CORE if processes == 1 else None,
                env={**env, "FOREBAY_API__PORT": str(port)},
            )
            for index, port in enumerate(ports)
        ]
        self.worker = lab.start(
            python("workers", "--model", MODEL),
            name=f"{name}-worker",
            env=worker_env(url, capacity=slots, step_ms=step_ms),
        )
        listeners = list(zip(self.apis, ports, strict=True))
        self.port = ports[0]
        self._proxy: Child | None = None
        if processes > 1:
            self.port = free_port()
            argv = nginx.command(folder, listen=self.port, replicas=ports)
            self._proxy = lab.start(argv, name=f"{name}-nginx")
            listeners.append((self._proxy, self.port))
        for child, port in listeners:
            until(lambda port=port: listening(port), what=f"{child.name} to listen", child=child)  # type: ignore[misc]
        until(self._ready, what="a ready worker", child=self.worker)

    def _ready(self) -> bool:
        return any(worker.state == "ready" for worker in self.queue.workers())

    def api_rss_kib(self) -> float:
        """Resident memory of the API processes."""
        used = (psutil.Process(api.process.pid).memory_info().rss for api in self.apis)
        return float(sum(used)) / 1024

    def proxy_kib(self) -> float:
        """Memory of nginx's worker processes that they share with nobody."""
        if self._proxy is None:
            return 0.0
        workers = psutil.Process(self._proxy.process.pid).children()
        return float(sum(worker.memory_full_info().uss for worker in workers)) / 1024

    def api_cpu_s(self) -> float:
        return sum(api.cpu_s() for api in self.apis)

    def waiting(self) -> int:
        """Jobs that some API process is subscribed to."""
        prefix = keys.channel("").encode()
        channels: Any = self._redis.pubsub_channels(prefix + b"*")
        return len(channels)

    def endings(self, ids: list[str]) -> list[tuple[int, int]]:
        """Of each job: completion in Unix ms, 0 without one; terminal events in its log."""
        found = []
        for at in range(0, len(ids), _BATCH):
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in ids[at : at + _BATCH]:
                    pipe.hget(keys.job(job_id), "finished_ms")
                    pipe.lrange(keys.events(job_id), 0, -1)
                raw = pipe.execute()
            for finished_ms, log in zip(raw[::2], raw[1::2], strict=True):
                found.append((int(finished_ms or 0), sum(b'"job.completed"' in e for e in log)))
        return found

    def job_count(self) -> int:
        """Jobs in the tenants' lists."""
        lists: list[Any] = list(self._redis.scan_iter(keys.tenant_jobs("*"), count=1000))
        counts: list[Any] = [self._redis.zcard(name) for name in lists]
        return sum(counts)

    def close(self) -> None:
        self._redis.close()
