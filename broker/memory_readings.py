"""The readings of the in-memory queue."""

from __future__ import annotations

from dataclasses import replace

from broker.errors import JobNotFoundError
from broker.idempotency import name_digest
from broker.jobs import BANDS, Band, Event, EventType, Job, Status
from broker.memory_prospect import prospect_of
from broker.memory_state import ModelQueue
from broker.memory_store import MemoryStore
from broker.prospect import COUNTED, position
from broker.reading_calls import tenant_stats
from broker.stats import (
    BandStats,
    Claimable,
    DeadLetter,
    LeaseStats,
    Position,
    QueueStats,
    TenantQueue,
    WorkerStatus,
)
from broker.usage import TenantUsage


class MemoryReadings(MemoryStore):
    """What changes no job."""

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        with self._lock:
            return self._owned(job_id, tenant).job

    def is_named(self, tenant: str, idempotency_key: str) -> bool:
        """Whether the tenant has used this idempotency key in the last 24 hours."""
        with self._lock:
            known = self._named.get((tenant, name_digest(idempotency_key)))
            return known is not None and known.expires_ms > self._clock_ms()

    def was_kept(self, job_id: str, *, tenant: str) -> bool:
        with self._lock:
            record = self._find(job_id)
            owner = record.job.tenant if record else self._expired.get(job_id)
            return owner == tenant

    def list_jobs(
        self,
        tenant: str,
        *,
        status: Status | None = None,
        model: str | None = None,
        band: Band | None = None,
        created_after_ms: int = 0,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        with self._lock:
            jobs = [
                record.job
                for record in map(self._find, list(self._records))
                if record and record.job.tenant == tenant
            ]
        jobs.sort(key=lambda job: (job.created_ms, job.id), reverse=newest_first)
        if after is not None:
            places = [place for place, job in enumerate(jobs) if job.id == after]
            if not places:
                raise JobNotFoundError(after)
            jobs = jobs[places[0] + 1 :]
        found = [
            replace(job, body=b"", output=None)
            for job in jobs
            if (status is None or job.status is status)
            and (model is None or job.model == model)
            and (band is None or job.band is band)
            and job.created_ms >= created_after_ms
        ]
        return found[:limit], len(found) > limit

    def count_claimable(self, queue: str, most: int, *, batch_room: int | None = None) -> Claimable:
        with self._lock:
            state = self._queues.setdefault(queue, ModelQueue())
            self._reclaim(state)
            self._promote(state)
            self._expire(state)
            if state.mode == "paused":
                return Claimable(0, 0)
            room: dict[str, int] = {}
            counts = dict.fromkeys(BANDS, 0)
            for band, race in state.fair.bands.items():
                for tenant in race.active:
                    cap = self._policy(tenant).max_in_flight
                    free = room.get(tenant, max(cap - state.running[tenant], 1))
                    taken = min(len(state.lists[band, tenant]), free)
                    room[tenant] = free - taken
                    counts[band] += taken
            batch = 0 if batch_room is None else counts.pop(Band.BATCH)
            anywhere = min(sum(counts.values()), most)
            return Claimable(anywhere, min(batch, batch_room or 0, most - anywhere))

    def events(self, job_id: str, *, after: int = 0) -> tuple[list[Event], bool]:
        with self._lock:
            log = list(self._owned(job_id, None).log)
        if not log or log[0].seq == 2:
            log.insert(0, Event(seq=1, type=EventType.QUEUED, attempt=0))
        return [event for event in log if event.seq > after], log[0].seq <= after + 1

    def text(self, job_id: str) -> str:
        with self._lock:
            record = self._find(job_id)
            return record.text if record else ""

    def position(self, job_id: str, *, tenant: str | None = None) -> Position | None:
        with self._lock:
            job = self._owned(job_id, tenant).job
            if job.status is not Status.QUEUED:
                return None
            state = self._queues[job.model]
            view = prospect_of(state, job.tenant, job.band, self._clock_ms(), self._policy)
            if job_id in state.delayed:
                return position(view, 0, due_ms=state.delayed[job_id])
            waiting = state.lists[job.band, job.tenant]
            place = waiting.index(job_id)
            if place < COUNTED:
                return position(view, place)
            since = state.since[job.band]
            rank = sorted(since, key=lambda each: (since[each], each.encode())).index(job_id)
            place = max(rank * len(waiting) // len(since), COUNTED)
            return position(view, min(place, len(waiting) - 1), exact=False)

    def stats(self, queue: str, *, top: int = 20) -> QueueStats:
        with self._lock:
            state = self._queues.get(queue) or ModelQueue()
            now = self._clock_ms()
            tenants = [
                tenant_stats(
                    tenant, state.waiting[tenant], state.running[tenant], state.drains.get(tenant)
                )
                for tenant in sorted({*state.waiting, *state.running}, reverse=True)
                if state.waiting[tenant] + state.running[tenant]
            ]
            tenants.sort(key=lambda each: each.queued + each.in_flight, reverse=True)
            drain = state.drains.get(None)
            oldest = [moment for since in state.since.values() for moment in since.values()]
            if drain and oldest:
                drain = drain.seen(now, min(oldest))
            return QueueStats(
                queue=queue,
                bands=tuple(
                    BandStats(
                        band=band,
                        depth=len(since),
                        oldest_ms=now - min(since.values(), default=now),
                    )
                    for band, since in state.since.items()
                ),
                delayed=len(state.delayed),
                in_flight=len(state.leases),
                dead=len(state.dead),
                mode=state.mode,
                stale_writes=state.stale,
                jobs_per_s=(drain and drain.jobs_per_s) or 0.0,
                tokens_per_s=(drain and drain.tokens_per_s) or 0.0,
                top_tenants=tuple(tenants[:top]),
            )

    def tenant_queue(self, queue: str, tenant: str) -> TenantQueue:
        with self._lock:
            state = self._queues.get(queue) or ModelQueue()
            now = self._clock_ms()
            bands = []
            for band, since in state.since.items():
                waiting = state.lists.get((band, tenant)) or ()
                oldest = now - since[waiting[0]] if waiting else 0
                bands.append(BandStats(band=band, depth=len(waiting), oldest_ms=oldest))
            known, running = state.waiting.get(tenant, 0), state.running.get(tenant, 0)
            rates = tenant_stats(tenant, known, running, state.drains.get(tenant))
            return TenantQueue(
                queue=queue,
                mode=state.mode,
                bands=tuple(bands),
                delayed=known - sum(band.depth for band in bands),
                in_flight=running,
                jobs_per_s=rates.jobs_per_s,
                tokens_per_s=rates.tokens_per_s,
            )

    def usage(self, tenant: str, *, hours: int, model: str | None = None) -> TenantUsage:
        with self._lock:
            return self._usage.read(tenant, self._clock_ms(), hours, model)

    def leases(self, queue: str, *, owner: str | None = None, limit: int = 100) -> list[LeaseStats]:
        with self._lock:
            state = self._queues.get(queue) or ModelQueue()
            held = [
                LeaseStats(
                    job_id=job_id,
                    tenant=self._records[job_id].job.tenant,
                    attempt=lease.attempt,
                    owner=lease.owner,
                    started_ms=self._records[job_id].job.started_ms,
                    renewed_ms=lease.deadline_ms - self._lease_ms,
                    expires_ms=lease.deadline_ms,
                )
                for job_id, lease in state.leases.items()
                if owner in (None, lease.owner)
            ]
            return sorted(held, key=lambda each: (each.expires_ms, each.job_id))[:limit]

    def dead_letters(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[list[DeadLetter], bool]:
        with self._lock:
            letters = self._letters(queue, tenant, job_id)[::-1]
            if after is not None:
                place = _place(after)
                letters = [letter for letter in letters if _place(letter.letter) < place]
            return [self._shown(letter) for letter in letters[:limit]], len(letters) > limit

    def _shown(self, letter: DeadLetter) -> DeadLetter:
        """With what the record still tells."""
        record = self._find(letter.job_id)
        if record is None:
            return replace(letter, alive=False)
        job = record.job
        return replace(letter, endpoint=job.endpoint, band=job.band, error=job.error)

    def heartbeat(self, status: WorkerStatus, *, ttl_s: float) -> None:
        with self._lock:
            self._workers[status.owner] = (status, self._clock_ms() + int(ttl_s * 1000))

    def workers(self) -> list[WorkerStatus]:
        with self._lock:
            now = self._clock_ms()
            return [status for status, expires in self._workers.values() if expires > now]

    def forget_worker(self, owner: str) -> None:
        with self._lock:
            self._workers.pop(owner, None)

    def queues(self) -> list[str]:
        with self._lock:
            return sorted(self._queues)

    def ping(self) -> None:
        return None


def _place(letter: str) -> tuple[int, ...]:
    return tuple(map(int, letter.split("-")))
