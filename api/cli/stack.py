"""A stack from its first process to its last: started in order, watched, ended in order."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import aiohttp

from api.cli.datadir import RunFile
from api.cli.fleet.judge import release_process
from api.cli.fleet.watching import judge_for, watch
from api.cli.merged_log import MergedLog
from api.cli.plan import Plan
from api.cli.pulling import Report, pull
from api.cli.supervisor import StartFailedError, Supervisor
from api.cli.valkey import Valkey, await_redis
from broker.connections import connect
from broker.redis_queue import RedisQueue
from config.settings import Settings

#: All ends within this; the last seconds are Flower's and Valkey's.
_STOP_S = 14.0
#: When the API and the workers must be gone.
_DRAINED_S = 11.5
#: The API gets this long to close its listeners before the workers begin to drain.
_API_HEAD_START_S = 0.4
#: Longest wait for Redis to load its data.
_REDIS_S = 120.0
_POLL_S = 0.1


class Stack:
    """Everything `forebay up` runs. Belongs to the main thread's event loop."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        *,
        log: MergedLog,
        valkey: Valkey | None,
        prepare_accounts: Callable[[], str],
        report: Report,
    ) -> None:
        """`settings` are those of the children; `valkey` is None when Redis is given.

        `prepare_accounts` returns the admin key; `report` hears of models being fetched.
        """
        self._plan = plan
        self._settings = settings
        self._log = log
        self._valkey = valkey
        self._prepare_accounts = prepare_accounts
        self._report = report
        self._supervisor = Supervisor(log)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> RunFile:
        """Start everything and wait until it answers.

        Raises `StartFailedError`, `ValkeyError`, `PullError`, `AccountsError`, `BrokerError`.
        """
        redis_url = self._settings.redis.url.get_secret_value()
        if self._valkey is not None:
            self._supervisor.start(await asyncio.to_thread(self._valkey.prepare))
        await self._or_failure(await_redis(redis_url, timeout_s=_REDIS_S))
        admin_key = await asyncio.to_thread(self._prepare_accounts)
        if self._plan.engine != "simulated":
            names = [model.name for model in self._plan.models]
            await pull(names, self._plan.environment, report=self._report)
        self._plan.clean_metrics()
        for spec in (
            *self._plan.api_specs(),
            *self._plan.worker_specs(self._release),
            *self._plan.webhook_specs(),
            *self._plan.flower_specs(),
        ):
            self._supervisor.start(spec)
        await self._or_failure(self._answers())
        self._supervisor.ready = True
        self._watching = asyncio.create_task(self._watch())
        run = RunFile(
            pid=os.getpid(),
            api=self._plan.api,
            flower=self._plan.flower,
            metrics=self._plan.metrics,
            admin_key=admin_key,
            redis_url=redis_url,
            database_url=self._settings.database.url.get_secret_value(),
            env=dict(self._plan.settings),
        )
        self._plan.home.write_run(run)
        return run

    async def stop(self) -> None:
        """The API stops accepting, workers drain, then Flower, Valkey last."""
        self._plan.home.remove_run()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        began = time.monotonic()
        drained = began + _DRAINED_S
        names = list(self._supervisor.children)
        apis = [name for name in names if name.startswith("api")]
        workers = [name for name in names if name.startswith("worker-")]
        ending = asyncio.create_task(self._supervisor.stop(apis, deadline=drained))
        await asyncio.wait([ending], timeout=_API_HEAD_START_S)
        await asyncio.gather(ending, self._supervisor.stop(workers, deadline=drained))
        late = began + _STOP_S
        await self._supervisor.stop(["flower"], deadline=min(late, time.monotonic() + 1.5))
        await self._supervisor.stop(["valkey"], deadline=late)

    def kill(self) -> None:
        """End everything at once."""
        self._supervisor.kill()

    async def _answers(self) -> None:
        """Wait until the API is ready and Flower answers; say what is still missing."""
        said = ""
        timeout = aiohttp.ClientTimeout(total=3)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                missing = await _missing(session, self._plan)
                if not missing:
                    return
                if missing != said:
                    said = missing
                    self._log.say("up", f"waiting: {missing}")
                await asyncio.sleep(_POLL_S)

    async def _or_failure(self, wanted: Awaitable[None]) -> None:
        """Wait for something unless a child can't be started."""
        doing = asyncio.ensure_future(wanted)
        failing = asyncio.create_task(self._supervisor.failure())
        try:
            await asyncio.wait([doing, failing], return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                await failing
            await doing
        finally:
            for task in (doing, failing):
                task.cancel()
                with suppress(asyncio.CancelledError, StartFailedError):
                    await task

    async def _watch(self) -> None:
        """Take out workers that stand still."""
        with connect(self._settings.redis) as client:
            queue = RedisQueue(client, self._settings.queue)
            judge = judge_for(self._settings)
            await watch(queue, self._supervisor, judge, log=self._log, who="up")

    def _release(self, pid: int) -> None:
        """Give back the leases of a worker whose process is gone, so that no job waits for them."""
        with connect(self._settings.redis) as client:
            count = release_process(RedisQueue(client, self._settings.queue), pid)
        if count:
            self._log.say("up", f"gave back {count} jobs of pid {pid}")


async def _missing(session: aiohttp.ClientSession, plan: Plan) -> str:
    try:
        async with session.get(f"{plan.api}/readyz") as response:
            if response.status != 200:
                return _summary(await response.text())
    except (aiohttp.ClientError, TimeoutError, OSError):
        return "api doesn't answer yet"
    if plan.with_flower:
        try:
            async with session.get(f"{plan.flower}/healthcheck") as response:
                if response.status >= 500:
                    return f"flower answers {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError):
            return "flower doesn't answer yet"
    return ""


def _summary(body: str) -> str:
    """What `/readyz` says is missing, on one line."""
    with suppress(ValueError):
        return json.dumps(json.loads(body), separators=(",", ":"))[:300]
    return "api is not ready"
