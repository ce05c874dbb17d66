"""Webhooks against receivers that misbehave and workers that are killed between send and record.

Jobs end in a real queue; the webhook workers deliver to receivers on the loopback that hang, reset,
answer 500, 429, 410 and 3xx, and to names that lead inside or change their minds. 127.0.0.1 stands
for the internet, 127.0.0.2 for the inside: a connection there is counted. Meanwhile workers are
killed with SIGKILL just after receivers have got a message. At the end every message of a receiver
that answers at last must have arrived, each with one id.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import redis
import standardwebhooks
from aiohttp import web

from broker import keys
from broker.connections import connect
from broker.jobs import NewJob, Outcome, Status
from broker.redis_queue import RedisQueue
from broker.webhooks import signing
from broker.webhooks.endpoints import Endpoint, Signing
from config.settings import Settings
from loadtests.chaos_webhook_worker import INSIDE, NAMES, OUTSIDE
from loadtests.harness import Bar, BenchError, conditions, report, say, table
from loadtests.lab import Child, Lab, python, run

TENANT = "chaos"
MODEL = "chaos"
WORKERS = 2
#: Waits of the plan, short enough for the run and long enough for every fault to pass.
RETRY_S = "0 " + " ".join(["0.5"] * 40)
TIMEOUT_S = 1.0
#: Time for everything to arrive once the faults are over.
SETTLE_S = 60.0
#: Bound of the part with faults.
FAULTS_S = 110.0

#: Receivers: path → what it does. Those that answer at last have to get everything.
HEALING = ("good", "hang", "reset", "500", "429", "redirect", "slow")
NEVER = ("gone", "private", "metadata", "mixed", "rebind")


@dataclass
class Ledger:
    """What was sent where, as the receivers saw it."""

    #: Receiver → webhook-id → times.
    got: dict[str, Counter[str]] = field(default_factory=dict)
    unverified: int = 0
    redirected: int = 0
    inside: int = 0
    #: Set at each arrival: the moment to kill a worker.
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    healed: bool = False


class Receivers:
    """All receivers in one server, and the trap inside."""

    def __init__(self, ledger: Ledger, secrets: dict[str, str], *, rng: random.Random) -> None:
        self._ledger = ledger
        self._secrets = secrets
        self._rng = rng
        self._runners: list[web.AppRunner] = []
        self.port = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{name}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, OUTSIDE, 0).start()
        self.port = runner.addresses[0][1]
        self._trap = await asyncio.start_server(self._trapped, INSIDE, self.port)

    async def stop(self) -> None:
        self._trap.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _trapped(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ledger.inside += 1
        writer.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        body = await request.read()
        ledger = self._ledger
        if name == "elsewhere":
            ledger.redirected += 1
            return web.Response()
        try:
            standardwebhooks.Webhook(self._secrets[name]).verify(body, dict(request.headers))
        except standardwebhooks.WebhookVerificationError:
            ledger.unverified += 1
            return web.Response(status=400)
        ledger.got.setdefault(name, Counter())[request.headers["webhook-id"]] += 1
        ledger.arrived.set()
        if name == "gone":
            return web.Response(status=410)
        if ledger.healed or self._rng.random() < 0.2:
            return web.Response(status=204)
        return await self._misbehave(name, request)

    async def _misbehave(self, name: str, request: web.Request) -> web.StreamResponse:
        if name == "hang":
            await asyncio.sleep(TIMEOUT_S * 2)
        elif name == "slow":
            # Long enough that a kill comes between having it and saying so.
            await asyncio.sleep(TIMEOUT_S / 2)
        elif name == "reset" and request.transport is not None:
            request.transport.abort()
        elif name == "500":
            return web.Response(status=500)
        elif name == "429":
            return web.Response(status=429, headers={"Retry-After": "1"})
        elif name == "redirect":
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        return web.Response(status=204)


class Run:
    """One run: Valkey, workers, receivers, jobs."""

    def __init__(self, lab: Lab, *, seed: int, jobs: int, kills: int) -> None:
        self._lab = lab
        self._rng = random.Random(seed)
        self._jobs = jobs
        self._kills = kills
        self.killed = 0
        self._generation = 0
        self.ledger = Ledger()
        #: Ids of the messages that each receiver has to get.
        self._expected: set[str] = set()
        url = lab.redis()
        self._key = f"key of the chaos run {seed}"
        self._settings = Settings(redis={"url": url}, webhooks={"key": self._key})
        self._client: redis.Redis = connect(self._settings.redis)
        self._queue = RedisQueue(self._client, self._settings.queue)
        self._env = {
            "FOREBAY_REDIS__URL": url,
            "FOREBAY_WEBHOOKS__KEY": self._key,
            "FOREBAY_WEBHOOKS__ALLOW_LOOPBACK": "true",
            "FOREBAY_WEBHOOKS__RETRY_S": RETRY_S,
            "FOREBAY_WEBHOOKS__TIMEOUT_S": str(TIMEOUT_S),
            "FOREBAY_WEBHOOKS__MAX_IN_FLIGHT": "64",
            "FOREBAY_WORKER__TASK_EVENTS": "false",
            "FOREBAY_LOG__LEVEL": "warning",
        }

    async def go(self) -> float:
        """Seconds that it took for all to arrive after the faults."""
        names = (*HEALING, *NEVER)
        key = signing.installation_key(self._settings)
        secrets = {name: signing.shown(signing.secret(key, f"wep_{name}", 1)) for name in names}
        receivers = Receivers(self.ledger, secrets, rng=self._rng)
        await receivers.start()
        workers: list[Child] = []
        try:
            for name in names:
                host = f"{name}.test" if name in NAMES else OUTSIDE
                endpoint = Endpoint(
                    id=f"wep_{name}",
                    url=f"http://{host}:{receivers.port}/{name}",
                    event_types=("*",),
                    signing=Signing(),
                )
                hash_key = keys.webhook_endpoints(TENANT)
                self._client.hset(hash_key, endpoint.id, endpoint.to_json())
            workers += [self._start() for _ in range(WORKERS)]
            async with asyncio.timeout(FAULTS_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._work())
                tasks.create_task(self._kill(workers))
            say(f"{self.killed} workers killed; receivers answer from now on")
            self.ledger.healed = True
            return await self._settle()
        finally:
            for child in workers:
                child.stop()
            await receivers.stop()

    def close(self) -> None:
        self._client.close()

    def _start(self) -> Child:
        self._generation += 1
        name = f"webhooks-{self._generation}"
        return self._lab.start(python("loadtests.chaos_webhook_worker"), name=name, env=self._env)

    async def _work(self) -> None:
        """Jobs come, run and end: completed, failed and cancelled."""
        for number in range(self._jobs):
            job = NewJob(tenant=TENANT, model=MODEL, endpoint="/v1/embeddings", body=b"{}")
            await asyncio.to_thread(self._queue.enqueue, job)
            # Told of, accepted, started and ended; or cancelled while it waited.
            self._expected.add(f"evt_{job.id.removeprefix('job_')}_{2 if number % 10 == 0 else 3}")
            if number % 10 == 0:
                await asyncio.to_thread(self._queue.cancel, job.id)
            else:
                (claim,) = await asyncio.to_thread(self._queue.claim, MODEL, "chaos")
                status = Status.FAILED if number % 10 == 1 else Status.COMPLETED
                await asyncio.to_thread(self._queue.complete, claim, Outcome(status=status))
            await asyncio.sleep(0.02)

    async def _kill(self, workers: list[Child]) -> None:
        for _ in range(self._kills):
            await asyncio.sleep(self._rng.uniform(1.0, 3.0))
            self.ledger.arrived.clear()
            with contextlib.suppress(TimeoutError):
                # Receivers have it, the worker has not written it down.
                await asyncio.wait_for(self.ledger.arrived.wait(), 15)
            victim = self._rng.randrange(len(workers))
            workers[victim].kill()
            self.killed += 1
            workers[victim] = self._start()

    async def _settle(self) -> float:
        began = time.monotonic()
        while time.monotonic() - began < SETTLE_S:
            if not any(self.missing().values()) and not await asyncio.to_thread(self.unrecorded):
                break
            await asyncio.sleep(0.5)
        return time.monotonic() - began

    def missing(self) -> dict[str, int]:
        """Receiver → ends of jobs it was never told of."""
        return {
            name: len(self._expected - self.ledger.got.get(name, Counter()).keys())
            for name in HEALING
        }

    def unrecorded(self) -> int:
        """Deliveries of receivers that answer at last which aren't known to have arrived."""
        return sum(
            fields.get(b"state") != b"delivered"
            for name in HEALING
            for fields in self._deliveries(name)
        )

    def blocked(self, name: str) -> int:
        """Attempts to a name that leads inside which were refused."""
        return sum(
            fields.get(b"tries", b"").count(b"address_blocked") for fields in self._deliveries(name)
        )

    def _deliveries(self, name: str) -> list[dict[bytes, bytes]]:
        pipe: Any = self._client.pipeline(transaction=False)
        ids: Any = self._client.zrange(keys.webhook_log(f"wep_{name}"), 0, -1)
        for delivery_id in ids:
            pipe.hgetall(keys.webhook_delivery(delivery_id.decode()))
        found: list[dict[bytes, bytes]] = pipe.execute()
        return found

    def disabled(self) -> bool:
        return bool(self._client.hget(keys.webhook_health("wep_gone"), "disabled_ms"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos_webhooks", description=__doc__)
    parser.add_argument("--seed", type=int, help="moments of the faults; default: random")
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--kills", type=int, default=12)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    say(f"seed {seed}: {arguments.jobs} jobs, {arguments.kills} kills")
    where = conditions("redis", "aiohttp", "celery", "standardwebhooks")
    with Lab() as lab:
        made = Run(lab, seed=seed, jobs=arguments.jobs, kills=arguments.kills)
        try:
            settle_s = asyncio.run(made.go())
            return _show(made, where, seed, settle_s)
        except TimeoutError:
            raise BenchError("the run took longer than it may") from None
        finally:
            made.close()


def _show(made: Run, where: str, seed: int, settle_s: float) -> int:
    ledger, missing, gone_disabled = made.ledger, made.missing(), made.disabled()
    blocked = {name: made.blocked(name) for name in NAMES}
    rows: list[tuple[object, ...]] = []
    for name in HEALING:
        got = ledger.got.get(name, Counter())
        rows.append((name, len(got), missing[name], got.total() - len(got), ""))
    gone = ledger.got.get("gone", Counter())
    note = "disabled" if gone_disabled else "NOT DISABLED"
    rows.append(("gone", len(gone), "", gone.total() - len(gone), note))
    for name, count in blocked.items():
        got = ledger.got.get(name, Counter())
        rows.append((name, len(got), "", "", f"{count} attempts blocked"))
    print(where)
    print(
        f"seed {seed}: {made.killed} webhook workers killed (kill -9), {WORKERS} at a time, all"
        f" arrived {settle_s:.1f} s after the last fault\n"
    )
    print(table(("receiver", "messages", "lost", "sent again", ""), rows))
    print()
    figures: dict[str, float] = {
        "deliveries": sum(len(each) for each in ledger.got.values()),
        "lost": sum(missing.values()),
        "private_connections": ledger.inside,
        "unverified": ledger.unverified,
        "redirects_followed": ledger.redirected,
        "gone_disabled": int(gone_disabled),
        "blocked": sum(blocked.values()),
        "kills": made.killed,
        "unrecorded": made.unrecorded(),
        "settle_s": settle_s,
    }
    zeros = ("lost", "private_connections", "unverified", "redirects_followed", "unrecorded")
    bars = [Bar(figure=name, relation="at most", limit=0) for name in zeros]
    bars += [
        Bar(figure="gone_disabled", relation="at least", limit=1),
        Bar(figure="blocked", relation="at least", limit=len(blocked)),
    ]
    return report("chaos-webhooks", figures, bars)


if __name__ == "__main__":
    run(main)
