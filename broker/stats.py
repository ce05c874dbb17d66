"""Readings of a queue and of its workers, for consoles, metrics and readiness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from broker.jobs import Band, JobError

#: `paused`: nothing is claimed; `draining`: nothing new is taken.
QueueMode = Literal["running", "paused", "draining"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BandStats:
    band: Band
    #: Jobs waiting (delayed ones not counted).
    depth: int
    #: Age of the oldest waiting job; 0 when none waits.
    oldest_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantStats:
    tenant: str
    queued: int
    in_flight: int
    #: Jobs and tokens done per second, over about the last minute in which it had work.
    jobs_per_s: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantQueue:
    """A tenant's part of a queue."""

    queue: str
    mode: QueueMode
    bands: tuple[BandStats, ...]
    delayed: int
    in_flight: int
    #: Jobs and tokens done per second, over about the last minute in which it had work.
    jobs_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueStats:
    queue: str
    bands: tuple[BandStats, ...]
    delayed: int
    in_flight: int
    dead: int
    mode: QueueMode = "running"
    #: Writes of attempts that had lost their lease: refused, nothing changed.
    stale_writes: int = 0
    #: Jobs and tokens done per second, over about the last minute in which there was work.
    jobs_per_s: float = 0.0
    tokens_per_s: float = 0.0
    #: Tenants with most jobs (queued + running), most first.
    top_tenants: tuple[TenantStats, ...] = field(default=())

    @property
    def depth(self) -> int:
        return sum(band.depth for band in self.bands)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a waiting job stands."""

    #: Jobs of its tenant that wait before it in its band (a delayed one has none before it).
    position: int
    #: Counted; far behind it is estimated.
    exact: bool
    #: Unix milliseconds; None while nothing was measured.
    estimated_start_ms: int | None


class Claimable(NamedTuple):
    """Jobs that could be claimed now."""

    #: By any worker.
    anywhere: int
    #: Batch jobs, by the worker that asked.
    here: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseStats:
    """A running job and who holds it."""

    job_id: str
    tenant: str
    attempt: int
    owner: str
    #: Start of the attempt.
    started_ms: int
    renewed_ms: int
    #: When the job goes to another worker unless the lease is renewed.
    expires_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A job that was given up; at most 1,000 a queue, the oldest are dropped."""

    #: Place among the letters of its queue; older ones have lower places.
    letter: str
    job_id: str
    tenant: str
    #: Why, as the code of the job's error.
    code: str
    attempt: int
    died_ms: int
    #: The record still lives: the job can be read, and put in again.
    alive: bool
    #: Of the record, while it lives.
    endpoint: str = ""
    band: Band | None = None
    error: JobError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """A worker's last word about itself; written at every lease renewal."""

    #: Unique per process start: `<hostname>:<pid>:<random>`.
    owner: str
    queue: str
    hostname: str
    pid: int
    #: Name of the engine; `simulated` is always said.
    engine: str
    #: `fetching`, `loading`, `warming`, `ready`, `draining`; `failing` is said by the launcher of a
    #: worker that ends again and again.
    state: str
    capacity: int
    jobs: int
    #: Counts decode steps; stands still when the engine is stuck or idle.
    steps: int
    started_ms: int
    seen_ms: int
    #: The devices or processors it runs on, to be read by people.
    place: str = ""
    #: Jobs among `jobs` that wait for an answer which another job computes: they make no steps.
    waiting: int = 0

    @property
    def is_starting(self) -> bool:
        return self.state in ("fetching", "loading", "warming")
