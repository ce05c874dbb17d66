"""What `MemoryQueue` keeps: job records, leases, and one model queue's lists and race."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from broker.drain import Drain, drained
from broker.fairness import FairShare
from broker.jobs import BANDS, Band, Event, Job, NewJob, Status, Usage
from broker.limits import NO_LIMITS
from broker.memory_limits import Owner, limits_of
from broker.stats import DeadLetter, QueueMode

#: Events kept per job.
_EVENTS = 512
#: How long the rates of a tenant that has nothing done are kept.
_RATES_MS = 3_600_000


@dataclass(slots=True)
class Record:
    job: Job
    refunds: int = 0
    #: Rate limits it is under, and the bounds of jobs at once of tenant and key.
    limits: list[tuple[Owner, int]] = field(default_factory=list)
    max_jobs: int = 0
    key_max_jobs: int = 0
    #: Since when the job waits, or waited.
    since_ms: int = 0
    #: Attempts that were given back, and completed, by their worker.
    released: int = 0
    ended: int = 0
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    text: str = ""
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """What an idempotency key stands for."""

    request: str
    job_id: str
    expires_ms: int


@dataclass(slots=True)
class Lease:
    attempt: int
    charged: float
    owner: str
    deadline_ms: int
    cancel: bool = False


class ModelQueue:
    """What Redis keeps under `fb:{<queue>}:`."""

    def __init__(self) -> None:
        self.fair = FairShare()
        self.lists: dict[tuple[Band, str], deque[str]] = defaultdict(deque)
        #: Waiting job id -> when it came in, per band.
        self.since: dict[Band, dict[str, int]] = {band: {} for band in BANDS}
        self.waiting: dict[str, int] = defaultdict(int)
        self.running: dict[str, int] = defaultdict(int)
        self.parked: set[str] = set()
        self.leases: dict[str, Lease] = {}
        #: Job id -> when it is due.
        self.delayed: dict[str, int] = {}
        self.dead: deque[DeadLetter] = deque(maxlen=1000)
        self._letters = 0
        self.stale = 0
        self.mode: QueueMode = "running"
        #: Drain rates: of the queue (None) and of tenants.
        self.drains: dict[str | None, Drain] = {}

    def put(self, job: Job, now: int, *, head: bool) -> int:
        waiting = self.lists[job.band, job.tenant]
        if head:
            waiting.appendleft(job.id)
        else:
            waiting.append(job.id)
        self.since[job.band][job.id] = now
        if len(waiting) == 1 and job.tenant not in self.parked:
            self.fair.join(job.band, job.tenant)
        return len(waiting)

    def take(self, job: Job) -> None:
        """Take a waiting job out of its list."""
        waiting = self.lists[job.band, job.tenant]
        waiting.remove(job.id)
        del self.since[job.band][job.id]
        if not waiting:
            del self.lists[job.band, job.tenant]
            self.fair.leave(job.band, job.tenant)

    def unwait(self, job: Job) -> None:
        """End the waiting of a job, in its list or delayed."""
        if self.delayed.pop(job.id, None) is None:
            self.take(job)
        self.waiting[job.tenant] -= 1

    def bury(self, job: Job, code: str, now: int) -> None:
        self._letters += 1
        letter = DeadLetter(
            letter=f"{now}-{self._letters}",
            job_id=job.id,
            tenant=job.tenant,
            code=code,
            attempt=job.attempt,
            died_ms=now,
            alive=True,
        )
        self.dead.append(letter)

    def drain(self, tenant: str, now: int, since: int, tokens: float) -> None:
        """Take account of a completion."""
        for name in (None, tenant):
            self.drains[name] = drained(self.drains.get(name), now, since, tokens)

    def forget_rates(self, now: int) -> None:
        """Drop the rates of tenants that had nothing done for an hour, and what their jobs took."""
        for name, drain in list(self.drains.items()):
            if name is not None and drain.at_ms < now - _RATES_MS:
                del self.drains[name]
                self.fair.own.pop(name, None)

    def unbury(self, job_id: str) -> None:
        """The job is no dead letter any more, if it was one."""
        for letter in [letter for letter in self.dead if letter.job_id == job_id]:
            self.dead.remove(letter)

    def park(self, tenant: str) -> None:
        self.parked.add(tenant)
        for band in BANDS:
            self.fair.leave(band, tenant)

    def unpark(self, tenant: str, cap: int) -> None:
        if tenant in self.parked and self.running[tenant] < cap:
            self.parked.remove(tenant)
            for band in BANDS:
                if (band, tenant) in self.lists:
                    self.fair.join(band, tenant)


def new_record(new: NewJob, now: int) -> Record:
    """The record of a job that was just put in."""
    job = Job(
        id=new.id,
        tenant=new.tenant,
        key_id=new.key_id,
        model=new.model,
        endpoint=new.endpoint,
        band=new.band,
        status=Status.QUEUED,
        cost=new.cost,
        body=new.body,
        metadata=new.metadata,
        stream=new.stream,
        attempt=0,
        max_attempts=new.max_attempts,
        created_ms=now,
        started_ms=0,
        finished_ms=0,
        result_ttl_s=new.result_ttl_s,
        request_id=new.request_id,
        seq=1,
        output=None,
        error=None,
        usage=Usage(),
        deadline_ms=new.deadline_ms,
        execution_timeout_ms=new.execution_timeout_ms,
        webhook=new.webhook,
        no_store=new.no_store,
    )
    key_limits = new.key_limits if new.key_id else NO_LIMITS
    limits = limits_of(new.tenant, new.limits, new.key_id, key_limits)
    return Record(
        job,
        limits=limits,
        max_jobs=new.limits.max_jobs,
        key_max_jobs=key_limits.max_jobs,
        since_ms=now + new.delay_ms,
    )
