"""Readings of a queue and of its workers, for consoles, metrics and readiness."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.jobs import Band


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


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueStats:
    queue: str
    bands: tuple[BandStats, ...]
    delayed: int
    in_flight: int
    dead: int
    #: Tenants with most jobs (queued + running), most first.
    top_tenants: tuple[TenantStats, ...] = field(default=())

    @property
    def depth(self) -> int:
        return sum(band.depth for band in self.bands)


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
    #: `loading`, `ready`, `draining`.
    state: str
    capacity: int
    jobs: int
    #: Counts decode steps; stands still when the engine is stuck or idle.
    steps: int
    started_ms: int
    seen_ms: int
