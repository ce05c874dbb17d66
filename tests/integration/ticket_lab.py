"""Workers that take tickets from a real RabbitMQ, and the queue in Redis that they serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import orjson
import redis
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from broker.connections import connect
from broker.jobs import Band, Job, NewJob, Status
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from config.settings import Queue, Redis
from tests.conftest import PATIENCE_S, free_port
from tests.integration.worker_lab import until

MODEL = "smollm2-135m"
#: A step of the simulated engine; a job takes as many as it has tokens.
STEP_MS = 10.0


class TicketLab:
    """Starts real worker processes with the simulated engine."""

    def __init__(self, redis_url: str, amqp_url: str, folder: Path, *, ttl_s: float = 2.0) -> None:
        self.client = redis.Redis.from_url(redis_url, protocol=2)
        self.connection = connect(Redis(url=SecretStr(redis_url)))
        self.queue = RedisQueue(self.connection, Queue(lease_ttl_s=ttl_s))
        self.workers: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._ports: list[int] = []
        self._console: subprocess.Popen[bytes] | None = None
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "FOREBAY_REDIS__URL": redis_url,
            "FOREBAY_QUEUE__BROKER_URL": amqp_url,
            "FOREBAY_QUEUE__LEASE_TTL_S": str(ttl_s),
            "FOREBAY_QUEUE__RENEW_EVERY_S": str(ttl_s / 4),
            "FOREBAY_WORKER__ENGINE": "simulated",
            "FOREBAY_WORKER__GRACE_S": "2",
            "FOREBAY_SIMULATED__STEP_MS": str(STEP_MS),
            "FOREBAY_SIMULATED__STEP_MS_PER_SEQUENCE": "0",
            "FOREBAY_SIMULATED__PREFILL_MS_PER_TOKEN": "0",
            "FOREBAY_LOG__FORMAT": "json",
        }

    def begin(self, *, slots: int = 4, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker."""
        number = len(self.workers)
        self._ports.append(free_port())
        with (self._folder / f"worker-{number}.log").open("wb") as stream:
            worker = subprocess.Popen(
                [sys.executable, "-m", "workers", "--model", MODEL, "--name", f"w{number}"],
                cwd=self._folder,
                env={
                    **self._environment,
                    **environment,
                    "FOREBAY_SIMULATED__CAPACITY": str(slots),
                    "FOREBAY_WORKER__METRICS_PORT": str(self._ports[-1]),
                },
                stdout=stream,
                stderr=stream,
            )
        self.workers.append(worker)
        return worker

    def start(self, *, slots: int = 4, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it is ready."""
        worker = self.begin(slots=slots, **environment)
        self.await_ready(worker)
        return worker

    def console(self) -> str:
        """Start Flower; returns its address once it answers. It ends with the lab."""
        port = free_port()
        with (self._folder / "console.log").open("wb") as stream:
            self._console = subprocess.Popen(
                [sys.executable, "-m", "infra.console"],
                cwd=self._folder,
                env={**self._environment, "FOREBAY_FLOWER__PORT": str(port)},
                stdout=stream,
                stderr=stream,
            )

        def listens() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0

        until(listens, "the console listens")
        return f"http://127.0.0.1:{port}"

    def await_ready(self, worker: subprocess.Popen[bytes]) -> None:
        def ready() -> bool:
            assert worker.poll() is None, self.log(self.workers.index(worker))
            return any(each.state == "ready" for each in self._statuses(worker))

        until(ready, "worker ready")

    def _statuses(self, worker: subprocess.Popen[bytes]) -> list[WorkerStatus]:
        return [each for each in self.queue.workers() if each.pid == worker.pid]

    def log(self, number: int = 0) -> str:
        """What a worker said."""
        return (self._folder / f"worker-{number}.log").read_text(errors="replace")

    def events(self, number: int = 0) -> list[str]:
        lines = self.log(number).splitlines()
        return [orjson.loads(line)["event"] for line in lines if line.startswith("{")]

    def put(
        self,
        count: int = 1,
        *,
        tenant: str = "acme",
        steps: int = 1,
        band: Band = Band.INTERACTIVE,
    ) -> list[str]:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": steps,
            "temperature": 0,
        }
        jobs = [
            NewJob(
                tenant=tenant,
                model=MODEL,
                endpoint="/v1/chat/completions",
                band=band,
                body=orjson.dumps(body),
                cost=100,
            )
            for _ in range(count)
        ]
        for job in jobs:
            self.queue.enqueue(job)
        return [job.id for job in jobs]

    def job(self, job_id: str) -> Job:
        return self.queue.get(job_id)

    def jobs(self, ids: list[str]) -> list[Job]:
        return [self.job(job_id) for job_id in ids]

    def await_end(self, ids: list[str], patience_s: float = PATIENCE_S) -> float:
        """Wait until all jobs are terminal; returns how long it took (s)."""
        left = list(ids)

        def over() -> bool:
            while left and self.job(left[-1]).is_terminal:
                left.pop()
            return not left

        return until(over, "end of all jobs", patience_s)

    def jobs_after(self, ids: list[str]) -> list[Job]:
        """The jobs once all are over."""
        self.await_end(ids)
        return self.jobs(ids)

    def running(self) -> int:
        return self.queue.stats(MODEL).in_flight

    def assert_completed_once(self, ids: list[str]) -> None:
        for job_id in ids:
            assert self.job(job_id).status is Status.COMPLETED
            events, whole = self.queue.events(job_id)
            assert whole
            assert [event.type.is_terminal for event in events].count(True) == 1
        stats = self.queue.stats(MODEL)
        assert (stats.depth, stats.in_flight, stats.delayed) == (0, 0, 0)

    def counted(self, name: str, number: int = 0, **labels: str) -> float:
        """The value of one of a worker's counters."""
        with urlopen(
            f"http://127.0.0.1:{self._ports[number]}/metrics", timeout=PATIENCE_S
        ) as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def close(self) -> None:
        for worker in [*self.workers, *([self._console] if self._console else [])]:
            with suppress(ProcessLookupError):
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait(10)
        self.client.close()
        self.connection.close()
