"""Listens to what the workers of this machine say of themselves, and takes out those that don't
work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from api.cli.fleet.judge import Judge, Verdict
from api.cli.merged_log import MergedLog
from api.cli.supervisor import Supervisor
from broker.errors import BrokerError
from broker.queue import JobQueue
from config.settings import Settings

#: Pause between two looks (s).
LOOK_EVERY_S = 1.0
#: Patience with a worker, in terms of its own patience with its engine.
_STALL_PART = 1.5


def judge_for(settings: Settings) -> Judge:
    return Judge(stall_s=settings.worker.stall_s * _STALL_PART, silent_s=settings.queue.lease_ttl_s)


async def watch(
    queue: JobQueue,
    supervisor: Supervisor,
    judge: Judge,
    *,
    log: MergedLog,
    who: str,
    taken_out: Callable[[str, Verdict], None] = lambda _name, _verdict: None,
    after: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Look until cancelled; `taken_out` hears of each worker that is killed, `after` each look.

    While the broker is away nobody is judged.
    """
    while True:
        try:
            heard = await asyncio.to_thread(queue.workers)
        except BrokerError:
            judge.excuse()
            heard = None
        if heard is not None:
            names = supervisor.running()
            for verdict in judge.look(heard, names.keys()):
                name = names[verdict.pid]
                what = "stands still" if verdict.reason == "stalled" else "says nothing"
                log.say(who, f"{name} {what} with {verdict.jobs} jobs and is killed")
                taken_out(name, verdict)
                supervisor.take_out(name)
            if after is not None:
                await after()
        await asyncio.sleep(LOOK_EVERY_S)
