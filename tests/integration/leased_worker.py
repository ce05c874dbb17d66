"""A worker process for the tests: the real transport, registry and pool, and a task that obeys
its job's body instead of an engine.

    {"sleep_s": 0.5}          work that long (stops when the lease stops)
    {"raise": "SystemExit"}   raise that, unsettled
    {"unsettled": true}       return without settling

Runs as `python leased_worker.py QUEUE CONCURRENCY [EVENTS]`; settings come from the environment.
Each start of a job is noted in the sorted set `test:starts` as `<id>:<attempt>:<pid>`.
"""

from __future__ import annotations

import os
import sys
import time

import orjson
import redis

from broker import leases
from broker.app import make_app
from broker.cancels import CancelListener
from broker.connections import connect
from broker.errors import BrokerUnavailableError
from broker.jobs import Outcome, Status
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from config import logs, settings

SETTINGS = settings.load()
QUEUE = sys.argv[1]
CONCURRENCY = int(sys.argv[2])
OWNER = f"test:{os.getpid()}:0"


def status() -> WorkerStatus:
    return WorkerStatus(
        owner=OWNER,
        queue=QUEUE,
        hostname="test",
        pid=os.getpid(),
        engine="simulated",
        state="ready",
        capacity=CONCURRENCY,
        jobs=0,
        steps=0,
        started_ms=0,
        seen_ms=0,
    )


client = connect(SETTINGS.redis)
queue = RedisQueue(client, SETTINGS.queue)
registry = leases.LeaseRegistry(
    RedisQueue(connect(SETTINGS.redis), SETTINGS.queue),
    queue_name=QUEUE,
    owner=OWNER,
    ttl_s=SETTINGS.queue.lease_ttl_s,
    renew_every_s=SETTINGS.queue.renew_every_s,
    status=status,
    healthy=lambda: True,
    grace_s=SETTINGS.worker.grace_s,
)
app = make_app(SETTINGS, model_queues=[QUEUE])
NOTED = "NOTE_STARTS" in os.environ


def note(key: str, line: str) -> None:
    """Also across an outage, and once only though it may be sent twice."""
    at = time.time()
    for _ in range(100):
        try:
            client.zadd(key, {line: at}, nx=True)
            return
        except redis.RedisError:
            time.sleep(0.05)


@app.task(name="forebay.run_job")
def run_job(job_id: str) -> None:
    try:
        lease = registry.start_job(job_id)
    except KeyError:
        return
    job = lease.claim.job
    orders = orjson.loads(job.body)
    if NOTED:
        note("test:starts", f"{job.id}:{job.attempt}:{os.getpid()}")
    if "raise" in orders:
        raise {"SystemExit": SystemExit, "MemoryError": MemoryError, "ValueError": ValueError}[
            orders["raise"]
        ]
    if orders.get("unsettled"):
        return
    if "sleep_s" in orders:
        until = time.monotonic() + orders["sleep_s"]
        while time.monotonic() < until and not lease.stopping:
            lease.lost.wait(min(0.02, max(0.0, until - time.monotonic())))
    done = Status.CANCELLED if lease.cancelled.is_set() else Status.COMPLETED
    while not lease.lost.is_set():
        try:
            told = queue.complete(lease.claim, Outcome(status=done, output=b"{}"))
            if NOTED and not told:
                note("test:refused", f"{job.id}:{job.attempt}")
            break
        except BrokerUnavailableError:
            lease.lost.wait(0.1)
    registry.settle(lease)


if __name__ == "__main__":
    logs.configure(SETTINGS.log, process="worker")
    leases.install(registry)
    registry.start()
    CancelListener(client, QUEUE, registry.note_cancel).start()
    worker = app.Worker(
        hostname=f"w{os.getpid()}@test",
        concurrency=CONCURRENCY,
        queues=[QUEUE],
        task_events=SETTINGS.worker.task_events,
        without_gossip=True,
        without_mingle=True,
        loglevel="INFO",
        quiet=True,
    )
    worker.start()
    registry.stop()
    sys.exit(worker.exitcode or 0)
