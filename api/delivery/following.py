"""A job's events in order and without gaps, whatever happens to the live subscription."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from api.ports import Queue, Subscription
from broker.errors import BrokerUnavailableError
from broker.jobs import TERMINAL, Ending, Event, Job, Status
from broker.results import Resync

#: The event of the enqueue itself, known to whoever enqueued.
QUEUED_SEQ: Final = 1
#: Pause after a look at the queue that failed.
_RETRY_S: Final = 0.25
#: Looks at a text that keeps growing under the reader.
_SNAPSHOT_TRIES: Final = 20
#: Longest silence after which a waiter looks at the log: pub/sub may lose a message.
_LOOK_EVERY_S: Final = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Where a job stands, in place of events that the log no longer holds."""

    seq: int
    attempt: int
    status: Status
    #: Text of this attempt so far; empty for jobs that don't stream.
    text: str


class Follower:
    """Joins a job's log with its live events; the subscription must be open already."""

    def __init__(
        self,
        queue: Queue,
        subscription: Subscription,
        job_id: str,
        *,
        after: int = 0,
        from_log: bool = False,
    ) -> None:
        self._queue = queue
        self._subscription = subscription
        self._job_id = job_id
        #: Read from the log and not handed out yet, the earliest last.
        self._backlog: list[Event | Snapshot] = []
        #: Events may be missing: the log must be read before live ones are trusted.
        self._stale = from_log
        #: Sequence number of the last event handed out.
        self.seq = after
        #: A terminal event, or the snapshot of a terminal job, was handed out.
        self.finished = False
        #: What the last event told of a completed job, if it told anything.
        self.ending: Ending | None = None

    async def next(self, timeout_s: float) -> Event | Snapshot | None:
        """What comes after `seq`; None when nothing came within `timeout_s`.

        Raises `JobNotFoundError` when the job's record expires meanwhile.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            if self._backlog:
                return self._hand_out(self._backlog.pop())
            if self._stale:
                self._stale = not await self._read_log()
                if self._stale:
                    if loop.time() + _RETRY_S >= deadline:
                        return None
                    await asyncio.sleep(_RETRY_S)
                continue
            remaining = deadline - loop.time()
            item = await self._subscription.next(remaining) if remaining > 0 else None
            if item is None:
                # Nothing came, or something was lost: the next call finds out.
                self._stale = True
                return None
            if isinstance(item, Resync) or item.seq > self.seq + 1:
                self._stale = True
            elif item.seq == self.seq + 1:
                return self._hand_out(item)

    async def terminal(self, *, within_s: float) -> bool:
        """Skip to the end of the job; False when it isn't reached in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while not self.finished:
            remaining = deadline - loop.time()
            if remaining <= 0:
                return False
            await self.next(min(remaining, _LOOK_EVERY_S))
        return True

    def _hand_out(self, item: Event | Snapshot) -> Event | Snapshot:
        self.seq = item.seq
        if isinstance(item, Snapshot):
            self.finished = item.status in TERMINAL
        else:
            self.finished, self.ending = item.type.is_terminal, item.ending
        return item

    async def _read_log(self) -> bool:
        """Take over what is logged after `seq`. False when the queue can't be reached."""
        try:
            events, complete = await self._queue.events(self._job_id, after=self.seq)
            if complete:
                self._backlog = [*reversed(events)]
            else:
                self._backlog.append(await self._snapshot())
        except BrokerUnavailableError:
            return False
        return True

    async def _snapshot(self) -> Snapshot:
        """The text at one exact sequence number: read again while the job moves on."""
        job = await self._queue.get(self._job_id)
        for _ in range(_SNAPSHOT_TRIES):
            text = await self._queue.text(self._job_id)
            before, job = job, await self._queue.get(self._job_id)
            if before.seq == job.seq:
                break
        return Snapshot(seq=job.seq, attempt=job.attempt, status=job.status, text=text)


async def final_record(queue: Queue, job_id: str, *, within_s: float) -> Job:
    """The record of a job known to be terminal, over a short absence of the queue.

    Raises `BrokerUnavailableError` when the absence is longer, `JobNotFoundError`.
    """
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        try:
            return await queue.get(job_id)
        except BrokerUnavailableError:
            if asyncio.get_running_loop().time() + _RETRY_S >= deadline:
                raise
            await asyncio.sleep(_RETRY_S)
