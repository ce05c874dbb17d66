"""Keeps the workers of one machine: started in their places, watched, replaced, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import multiprocess

from api.cli.backoff import Backoff
from api.cli.fleet.judge import Verdict, release_process
from api.cli.fleet.metrics import FleetMetrics
from api.cli.fleet.placement import Place
from api.cli.fleet.watching import LOOK_EVERY_S, judge_for, watch
from api.cli.merged_log import MergedLog
from api.cli.plan import python
from api.cli.supervisor import Child, Spec, Supervisor
from broker.errors import BrokerError
from broker.queue import JobQueue
from broker.stats import WorkerStatus
from config.settings import Settings

#: What the launcher calls itself in the log.
WHO = "workers"
#: A new worker may take this long until it is ready, fetching its model included (s).
SWAP_S = 1800.0
#: Ends in a row from which a new worker isn't waited for any longer.
_SWAP_TRIES = 3
#: A drained worker ends this long after its grace at the latest (s).
_LATE_S = 5.0


@dataclass
class _Post:
    """A place, and the child that fills it."""

    place: Place
    #: Of the child; differs from the place's with every replacement.
    child: str
    generation: int = 1


class Fleet:
    """All workers of this launcher. Belongs to the main thread's event loop.

    `environment` is that of every worker, apart from its place; `metrics_folder` is where they
    write their metrics, if anywhere.
    """

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        *,
        environment: Mapping[str, str],
        log: MergedLog,
        metrics: FleetMetrics,
        metrics_folder: Path | None = None,
        backoff: type[Backoff] = Backoff,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._environment = environment
        self._log = log
        self._metrics = metrics
        self._folder = metrics_folder
        self._backoff = backoff
        self._supervisor = Supervisor(log, who=WHO)
        # One that can't be started is no reason to end the others.
        self._supervisor.ready = True
        self._posts: dict[str, _Post] = {}
        #: Children on their way in: they are watched, and hold no post yet.
        self._coming: dict[str, Place] = {}

    def start(self, places: Sequence[Place]) -> None:
        for place in places:
            post = _Post(place, f"worker-{place.name}")
            self._posts[place.name] = post
            self._launch(place, post.child)

    async def watch(self) -> None:
        """Take out what stands still, and tell of what fails, until cancelled."""
        await watch(
            self._queue,
            self._supervisor,
            judge_for(self._settings),
            log=self._log,
            who=WHO,
            taken_out=self._count_taken_out,
            after=self._tell_of_failing,
        )

    async def swap(self, places: Sequence[Place]) -> bool:
        """Replace every worker, one after another; whether all went well.

        A new worker is ready before the old one drains, so that no job waits for the model to
        load. One that doesn't get ready is dropped, and the old one stays. Workers without a place
        any more are drained, and new places are filled.
        """
        well = True
        for place in places:
            well = await self._replace(place) and well
        kept = {place.name for place in places}
        for name in [name for name in self._posts if name not in kept]:
            self._log.say(WHO, f"{name} has no place any more and is drained")
            await self._drain([self._posts.pop(name).child])
        return well

    async def stop(self) -> None:
        """Drain all: they take no more jobs, and finish or hand back those they have."""
        await self._drain(list(self._supervisor.children))

    async def kill(self) -> None:
        """End all at once, and give their jobs back."""
        pids = list(self._supervisor.running())
        self._supervisor.kill()
        await asyncio.to_thread(self._release_all, pids)

    # -- one worker --------------------------------------------------------------------------------
    def _launch(self, place: Place, child: str) -> Child:
        node = child.removeprefix("worker-")
        spec = Spec(
            name=child,
            argv=python(
                *("workers", "--model", place.model, "--name", node),
                interpreter=self._settings.worker.vllm_python if place.engine == "vllm" else "",
            ),
            env={**self._environment, **place.environment()},
            # Should the launcher be killed, its workers drain.
            death_signal=signal.SIGTERM,
            on_exit=lambda pid: self._after_end(place, pid),
        )
        self._log.say(WHO, f"{child} runs on {place.where}")
        return self._supervisor.start(spec, self._backoff())

    def _after_end(self, place: Place, pid: int) -> None:
        """In a thread: a worker ended on its own; its jobs needn't wait for their leases."""
        self._metrics.ended.labels(place.model).inc()
        self._forget_gauges(pid)
        count = release_process(self._queue, pid)
        if count:
            self._log.say(WHO, f"gave back {count} jobs of pid {pid}")

    def _count_taken_out(self, child: str, verdict: Verdict) -> None:
        if (place := self._places().get(child)) is not None:
            self._metrics.taken_out.labels(place.model, verdict.reason).inc()

    async def _replace(self, place: Place) -> bool:
        post = self._posts.get(place.name)
        if post is None:
            self.start([place])
            return True
        name = f"worker-{place.name}.{post.generation + 1}"
        self._coming[name] = place
        child = self._launch(place, name)
        try:
            ready = await self._await_ready(child)
        except asyncio.CancelledError:
            self._coming.pop(name, None)
            raise
        if not ready:
            self._log.say(WHO, f"{name} doesn't get ready; {post.child} stays")
            self._metrics.swaps.labels(place.model, "failed").inc()
            await self._drain([name])
            self._coming.pop(name, None)
            return False
        old = post.child
        self._posts[place.name] = _Post(place, name, post.generation + 1)
        self._coming.pop(name, None)
        self._log.say(WHO, f"{name} is ready; {old} is drained")
        await self._drain([old])
        self._metrics.swaps.labels(place.model, "done").inc()
        return True

    async def _await_ready(self, child: Child) -> bool:
        deadline = time.monotonic() + SWAP_S
        here = socket.gethostname()
        while time.monotonic() < deadline and child.backoff.failures < _SWAP_TRIES:
            for worker in await self._heard() or ():
                if (worker.pid, worker.hostname, worker.state) == (child.pid, here, "ready"):
                    return True
            await asyncio.sleep(LOOK_EVERY_S / 5)
        return False

    async def _drain(self, children: Sequence[str]) -> None:
        pids = [pid for pid, name in self._supervisor.running().items() if name in children]
        deadline = time.monotonic() + self._settings.worker.grace_s + _LATE_S
        await self._supervisor.stop(children, deadline=deadline)
        for name in children:
            self._supervisor.forget(name)
        await asyncio.to_thread(self._release_all, pids)

    # -- what the workers say ----------------------------------------------------------------------
    async def _heard(self) -> list[WorkerStatus] | None:
        """What all workers say of themselves; None while the broker is away."""
        try:
            return await asyncio.to_thread(self._queue.workers)
        except BrokerError:
            return None

    async def _tell_of_failing(self) -> None:
        """Workers that don't live long enough to speak are spoken for."""
        looping = [
            (child, place)
            for name, place in self._places().items()
            if (child := self._supervisor.children.get(name)) is not None and child.looping
        ]
        for model in {place.model for place in self._places().values()}:
            count = sum(1 for _, place in looping if place.model == model)
            self._metrics.failing.labels(model).set(count)
        for child, place in looping:
            status = self._failing(child, place)
            try:
                await asyncio.to_thread(self._queue.heartbeat, status, ttl_s=LOOK_EVERY_S * 3)
            except BrokerError:
                return

    def _failing(self, child: Child, place: Place) -> WorkerStatus:
        here, now_ms = socket.gethostname(), time.time_ns() // 1_000_000
        return WorkerStatus(
            owner=f"{here}:{os.getpid()}:{child.spec.name}",
            queue=place.model,
            hostname=here,
            pid=0,
            engine=self._settings.worker.engine,
            state="failing",
            capacity=0,
            jobs=0,
            steps=0,
            started_ms=now_ms,
            seen_ms=now_ms,
            place=place.where,
        )

    def _places(self) -> dict[str, Place]:
        posts = {post.child: post.place for post in self._posts.values()}
        return {**posts, **self._coming}

    def _release_all(self, pids: Sequence[int]) -> None:
        for pid in pids:
            self._forget_gauges(pid)
            try:
                release_process(self._queue, pid)
            except BrokerError:
                # Their leases run out by themselves.
                return

    def _forget_gauges(self, pid: int) -> None:
        if self._folder is not None:
            multiprocess.mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]
