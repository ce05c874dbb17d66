"""The queue in memory: the twin of the Lua scripts, for tests and for understanding them.

One process, one lock; state is lost with the object. `fairness.py` makes the choices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from broker.errors import DuplicateJobError, JobNotFoundError, QueueFullError
from broker.fairness import LEAST_TOKENS
from broker.jobs import (
    Band,
    Claim,
    Delta,
    Event,
    EventType,
    Job,
    JobError,
    NewJob,
    Outcome,
    Status,
)
from broker.memory_async import AsyncMemoryQueue
from broker.memory_state import Lease, ModelQueue, Record, new_record
from broker.policies import TenantPolicy
from broker.queue import CancelResult, LeaseState
from broker.stats import BandStats, QueueStats, TenantStats, WorkerStatus
from config.settings import Queue as QueueSettings

__all__ = ["AsyncMemoryQueue", "MemoryQueue"]


class MemoryQueue:
    """`JobQueue` without Redis; thread-safe."""

    def __init__(
        self,
        settings: QueueSettings,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._settings = settings
        self._default = TenantPolicy(
            weight=settings.default_weight,
            max_in_flight=settings.default_max_in_flight,
            max_queued=settings.default_max_queued,
        )
        self._clock_ms = clock_ms
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._queues: dict[str, ModelQueue] = {}
        self._policies: dict[str, TenantPolicy] = {}
        self._workers: dict[str, tuple[WorkerStatus, int]] = {}
        self._listeners: list[Callable[[str, Event], None]] = []

    def subscribe(self, callback: Callable[[str, Event], None]) -> Callable[[], None]:
        """Have every published event told, in order, from whatever thread causes it.

        Returns what ends it.
        """
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> int:
        with self._lock:
            queue = self._queues.setdefault(job.model, ModelQueue())
            if self._find(job.id):
                raise DuplicateJobError(job.id)
            bound = self._policy(job.tenant).max_queued
            if queue.waiting[job.tenant] >= bound:
                raise QueueFullError("tenant", bound)
            if sum(queue.waiting.values()) >= self._settings.max_queued_total:
                raise QueueFullError("model", self._settings.max_queued_total)
            now = self._clock_ms()
            record = new_record(job, now)
            self._records[job.id] = record
            queue.waiting[job.tenant] += 1
            if job.delay_ms > 0:
                queue.delayed[job.id] = now + job.delay_ms
                return len(queue.lists.get((job.band, job.tenant), ()))
            return queue.put(record.job, now, head=False) - 1

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        with self._lock:
            return self._owned(job_id, tenant).job

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

    def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        with self._lock:
            record = self._owned(job_id, tenant)
            job = record.job
            queue = self._queues[job.model]
            if job.status is Status.QUEUED:
                if queue.delayed.pop(job_id, None) is None:
                    queue.take(job)
                queue.waiting[job.tenant] -= 1
                self._finish(record, Outcome(status=Status.CANCELLED))
                return "cancelled"
            if job.status is Status.IN_PROGRESS:
                queue.leases[job_id].cancel = True
                self._advance(record, EventType.CANCELLING, status=Status.CANCELLING)
            return "terminal" if job.is_terminal else "cancelling"

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

    # -- working side -----------------------------------------------------------------------------
    def claim(self, queue: str, owner: str, *, limit: int = 1) -> list[Claim]:
        with self._lock:
            state = self._queues.setdefault(queue, ModelQueue())
            self._reclaim(state)
            self._promote(state)
            claims: list[Claim] = []
            while len(claims) < limit:
                choice = state.fair.choose(
                    lambda band, tenant: self._head(state, band, tenant).cost
                )
                if choice is None:
                    break
                if state.running[choice[1]] >= self._policy(choice[1]).max_in_flight:
                    state.park(choice[1])
                else:
                    job = self._start(state, self._head(state, *choice), owner)
                    claims.append(Claim(queue=queue, job=job))
            return claims

    def _start(self, state: ModelQueue, job: Job, owner: str) -> Job:
        policy = self._policy(job.tenant)
        charged = state.fair.start(job.band, job.tenant, job.cost, policy.weight)
        state.take(job)
        state.waiting[job.tenant] -= 1
        state.running[job.tenant] += 1
        if state.running[job.tenant] >= policy.max_in_flight:
            state.park(job.tenant)
        attempt, now = job.attempt + 1, self._clock_ms()
        state.leases[job.id] = Lease(attempt, charged, owner, now + self._lease_ms)
        record = self._records[job.id]
        record.text = ""
        self._advance(
            record,
            EventType.IN_PROGRESS,
            status=Status.IN_PROGRESS,
            attempt=attempt,
            started_ms=now,
        )
        return record.job

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> dict[str, LeaseState]:
        with self._lock:
            states: dict[str, LeaseState] = {}
            for job_id, attempt in leases:
                lease = self._lease(queue, job_id, attempt)
                if lease is None or lease.owner != owner:
                    states[job_id] = "lost"
                else:
                    lease.deadline_ms = self._clock_ms() + self._lease_ms
                    states[job_id] = "cancel" if lease.cancel else "ok"
            return states

    def emit(self, queue: str, deltas: Sequence[Delta]) -> list[str]:
        with self._lock:
            stale = []
            for delta in deltas:
                if self._lease(queue, delta.job_id, delta.attempt) is None:
                    stale.append(delta.job_id)
                elif fresh := self._fresh(delta):
                    record = self._records[delta.job_id]
                    record.text += fresh
                    self._advance(record, EventType.DELTA, fresh)
            return stale

    def _fresh(self, delta: Delta) -> str:
        """What of a piece wasn't brought before."""
        if delta.start is None:
            return delta.text
        known = len(self._records[delta.job_id].text.encode())
        return delta.text.encode()[max(known - delta.start, 0) :].decode()

    def complete(self, claim: Claim, outcome: Outcome) -> bool:
        return self._end(claim, outcome, dead=False)

    def bury(self, claim: Claim, error_code: str, message: str) -> bool:
        error = JobError(code=error_code, message=message)
        return self._end(claim, Outcome(status=Status.FAILED, error=error), dead=True)

    def _end(self, claim: Claim, outcome: Outcome, *, dead: bool) -> bool:
        with self._lock:
            lease = self._lease(claim.queue, claim.job.id, claim.attempt)
            record = self._find(claim.job.id)
            if record is None or lease is None:
                return record is not None and record.ended == claim.attempt
            job, state = record.job, self._queues[claim.queue]
            policy = self._policy(job.tenant)
            self._unlease(state, job)
            taken = max(outcome.usage.total_tokens, LEAST_TOKENS)
            state.fair.settle(job.band, job.tenant, taken - lease.charged, policy.weight)
            if outcome.status is Status.COMPLETED:
                state.fair.learn(job.cost, taken)
            state.unpark(job.tenant, policy.max_in_flight)
            record.ended = claim.attempt
            self._finish(record, outcome)
            if dead:
                state.dead.append(job.id)
            return True

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        with self._lock:
            lease = self._lease(claim.queue, claim.job.id, claim.attempt)
            record = self._find(claim.job.id)
            if record is None or lease is None:
                return record is not None and record.released == claim.attempt
            self._give_back(self._queues[claim.queue], record, delay_ms=delay_ms, refund=refund)
            record.released = claim.attempt
            return True

    def release_owner(self, queue: str, owner: str) -> int:
        with self._lock:
            state = self._queues.setdefault(queue, ModelQueue())
            ids = [job_id for job_id, lease in state.leases.items() if lease.owner == owner]
            for job_id in ids:
                self._give_back(state, self._records[job_id])
            return len(ids)

    def sweep(self, queue: str) -> int:
        with self._lock:
            state = self._queues.setdefault(queue, ModelQueue())
            healed = self._reclaim(state)
            self._promote(state)
            for tenant in list(state.parked):
                state.unpark(tenant, self._policy(tenant).max_in_flight)
            return healed

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(self, tenant: str, policy: TenantPolicy | None) -> None:
        with self._lock:
            if policy is None:
                self._policies.pop(tenant, None)
            else:
                self._policies[tenant] = policy
            for state in self._queues.values():
                state.unpark(tenant, self._policy(tenant).max_in_flight)

    def stats(self, queue: str, *, top: int = 20) -> QueueStats:
        with self._lock:
            state = self._queues.get(queue) or ModelQueue()
            now = self._clock_ms()
            tenants = [
                TenantStats(
                    tenant=tenant,
                    queued=state.waiting[tenant],
                    in_flight=state.running[tenant],
                )
                for tenant in sorted({*state.waiting, *state.running}, reverse=True)
                if state.waiting[tenant] + state.running[tenant]
            ]
            tenants.sort(key=lambda each: each.queued + each.in_flight, reverse=True)
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
                top_tenants=tuple(tenants[:top]),
            )

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

    # -- inside -----------------------------------------------------------------------------------
    @property
    def _lease_ms(self) -> int:
        return int(self._settings.lease_ttl_s * 1000)

    def _policy(self, tenant: str) -> TenantPolicy:
        return self._policies.get(tenant) or self._policies.get("*") or self._default

    def _find(self, job_id: str) -> Record | None:
        record = self._records.get(job_id)
        if record and record.expires_ms is not None and record.expires_ms <= self._clock_ms():
            del self._records[job_id]
            return None
        return record

    def _owned(self, job_id: str, tenant: str | None) -> Record:
        record = self._find(job_id)
        if record is None or (tenant is not None and record.job.tenant != tenant):
            raise JobNotFoundError(job_id)
        return record

    def _lease(self, queue: str, job_id: str, attempt: int) -> Lease | None:
        state = self._queues.get(queue)
        lease = state.leases.get(job_id) if state else None
        return lease if lease and lease.attempt == attempt else None

    def _head(self, state: ModelQueue, band: Band, tenant: str) -> Job:
        return self._records[state.lists[band, tenant][0]].job

    def _advance(self, record: Record, kind: EventType, text: str = "", **changes: object) -> None:
        job = record.job
        record.job = replace(job, seq=job.seq + 1, **changes)  # type: ignore[arg-type]
        event = Event(seq=record.job.seq, type=kind, attempt=record.job.attempt, text=text)
        record.log.append(event)
        for listener in list(self._listeners):
            listener(job.id, event)

    def _finish(self, record: Record, outcome: Outcome) -> None:
        now = self._clock_ms()
        record.expires_ms = now + record.job.result_ttl_s * 1000
        self._advance(
            record,
            EventType(f"job.{outcome.status}"),
            status=outcome.status,
            finished_ms=now,
            output=outcome.output,
            error=outcome.error,
            usage=outcome.usage,
        )

    def _unlease(self, state: ModelQueue, job: Job) -> Lease:
        state.running[job.tenant] -= 1
        return state.leases.pop(job.id)

    def _give_back(
        self, state: ModelQueue, record: Record, *, delay_ms: int = 0, refund: bool = False
    ) -> None:
        job, now = record.job, self._clock_ms()
        policy = self._policy(job.tenant)
        lease = self._unlease(state, job)
        if refund:
            record.refunds += 1
            state.fair.settle(job.band, job.tenant, -lease.charged, policy.weight)
        state.unpark(job.tenant, policy.max_in_flight)
        if lease.cancel:
            self._finish(record, Outcome(status=Status.CANCELLED))
        elif job.attempt - record.refunds >= job.max_attempts:
            message = f"The job was started {job.attempt} times and its worker was lost each time."
            error = JobError(code="max_attempts", message=message)
            self._finish(record, Outcome(status=Status.FAILED, error=error))
            state.dead.append(job.id)
        else:
            state.waiting[job.tenant] += 1
            self._advance(record, EventType.REQUEUED, status=Status.QUEUED)
            if delay_ms > 0:
                state.delayed[job.id] = now + delay_ms
            else:
                state.put(record.job, now, head=True)

    def _reclaim(self, state: ModelQueue) -> int:
        now = self._clock_ms()
        deadlines = sorted((lease.deadline_ms, job_id) for job_id, lease in state.leases.items())
        late = [job_id for deadline, job_id in deadlines if deadline <= now]
        for job_id in late:
            self._give_back(state, self._records[job_id])
        return len(late)

    def _promote(self, state: ModelQueue) -> None:
        now = self._clock_ms()
        for due, job_id in sorted((due, job_id) for job_id, due in state.delayed.items()):
            if due <= now:
                del state.delayed[job_id]
                state.put(self._records[job_id].job, now, head=False)
