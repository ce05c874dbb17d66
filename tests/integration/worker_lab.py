"""Real worker processes on a real Redis, for the tests of transport, registry and pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import orjson
import redis
from pydantic import SecretStr

from broker.connections import connect
from broker.jobs import Job, NewJob, Status
from broker.redis_queue import RedisQueue
from config.settings import Queue, Redis
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("leased_worker.py")
QUEUE = "tiny"


def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait for another process to get somewhere; returns how long it took (s)."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > patience_s:
            raise AssertionError(f"{what}: not within {patience_s} s")
        time.sleep(0.005)
    return time.monotonic() - begun


class Lab:
    """Workers, and the queue they serve."""

    def __init__(self, url: str, folder: Path, *, ttl_s: float = 2.0, grace_s: float = 8.0) -> None:
        self.url = url
        self.client = connect(Redis(url=SecretStr(url)))
        self.queue = RedisQueue(self.client, Queue(lease_ttl_s=ttl_s, claim_batch=4))
        self.workers: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "PYTHONPATH": str(ROOT),
            "NOTE_STARTS": "1",
            "FOREBAY_REDIS__URL": url,
            "FOREBAY_QUEUE__LEASE_TTL_S": str(ttl_s),
            "FOREBAY_QUEUE__RENEW_EVERY_S": str(ttl_s / 4),
            "FOREBAY_WORKER__GRACE_S": str(grace_s),
            "FOREBAY_LOG__FORMAT": "json",
        }

    def start(self, *, concurrency: int = 4, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it consumes."""
        (worker,) = self.start_many(1, concurrency=concurrency, **environment)
        return worker

    def start_many(
        self, count: int, *, concurrency: int = 4, **environment: str
    ) -> list[subprocess.Popen[bytes]]:
        """Start workers side by side and wait until all consume."""
        first = len(self.workers)
        for _ in range(count):
            self._begin(concurrency, environment)
        for number in range(first, first + count):
            until(partial(self._is_ready, number), "worker ready")
        return self.workers[first:]

    def _begin(self, concurrency: int, environment: dict[str, str]) -> None:
        log = self._folder / f"worker-{len(self.workers)}.log"
        with log.open("wb") as stream:
            worker = subprocess.Popen(
                [sys.executable, str(WORKER), QUEUE, str(concurrency)],
                cwd=self._folder,
                env={**self._environment, **environment},
                stdout=stream,
                stderr=stream,
            )
        self.workers.append(worker)

    def _is_ready(self, number: int) -> bool:
        return b"@test ready" in (self._folder / f"worker-{number}.log").read_bytes()

    def log(self, number: int = 0) -> list[dict[str, object]]:
        """What a worker said."""
        lines = (self._folder / f"worker-{number}.log").read_bytes().splitlines()
        return [orjson.loads(line) for line in lines if line.startswith(b"{")]

    def put(
        self, count: int = 1, *, tenant: str = "acme", attempts: int = 3, **body: object
    ) -> list[str]:
        jobs = [
            NewJob(
                tenant=tenant,
                model=QUEUE,
                endpoint="/v1/test",
                body=orjson.dumps(body),
                max_attempts=attempts,
            )
            for _ in range(count)
        ]
        for job in jobs:
            self.queue.enqueue(job)
        return [job.id for job in jobs]

    def job(self, job_id: str) -> Job:
        return self.queue.get(job_id)

    def starts(self) -> list[str]:
        """`<id>:<attempt>:<pid>` of each start, in order."""
        return [line.decode() for line in self.client.zrange("test:starts", 0, -1)]

    def await_start(self, job_id: str, *, attempt: int = 1) -> int:
        """Wait until an attempt runs; returns the worker's process id."""
        begun = f"{job_id}:{attempt}:"

        def runs() -> bool:
            return any(line.startswith(begun) for line in self.starts())

        until(runs, f"start of attempt {attempt}")
        return int(next(line for line in self.starts() if line.startswith(begun)).split(":")[2])

    def await_end(self, job_ids: list[str], patience_s: float = PATIENCE_S) -> float:
        """Wait until all jobs are terminal; returns how long it took (s)."""
        left = set(job_ids)

        def over() -> bool:
            for job_id in list(left):
                if self.job(job_id).is_terminal:
                    left.discard(job_id)
                else:
                    return False
            return True

        return until(over, "end of all jobs", patience_s)

    def assert_completed_once(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            assert self.job(job_id).status is Status.COMPLETED
            events, whole = self.queue.events(job_id)
            assert whole
            assert [event.type.is_terminal for event in events].count(True) == 1
        stats = self.queue.stats(QUEUE)
        assert (stats.depth, stats.in_flight, stats.delayed) == (0, 0, 0)

    def close(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait(10)
        self.client.close()


class Server:
    """A Redis with an append-only file that survives being stopped."""

    def __init__(self, binary: str, port: int, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = [
            binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def answers() -> bool:
            with suppress(redis.RedisError), redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
            return False

        until(answers, "server up")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
