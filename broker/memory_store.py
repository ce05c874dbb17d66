"""What all of the in-memory queue's verbs share: its state, and how jobs come out of a lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from math import ceil

from broker.errors import (
    JobNotFoundError,
    OverloadedError,
    QueueDrainingError,
    QueueFullError,
    RateLimitedError,
)
from broker.forecast import RIVALS, Outlook, part_of_band, queue_wait_ms, tenant_wait_ms
from broker.jobs import (
    BANDS,
    STUB_S,
    Band,
    Event,
    EventType,
    Job,
    JobError,
    Outcome,
    Status,
    Usage,
)
from broker.memory_limits import Meters
from broker.memory_state import Lease, ModelQueue, Named, Record
from broker.memory_usage import UsageBook
from broker.policies import TenantPolicy, shedding_marks
from broker.stats import DeadLetter, WorkerStatus
from broker.webhooks.outbox import MOST_EVENTS, OutboxEvent
from config.settings import Queue as QueueSettings


class MemoryStore:
    """State behind one lock; methods with an underscore want the lock held."""

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
        self._marks = shedding_marks(settings)
        self._clock_ms = clock_ms
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._queues: dict[str, ModelQueue] = {}
        self._policies: dict[str, TenantPolicy] = {}
        #: Owners of jobs that were kept long enough.
        self._expired: dict[str, str] = {}
        self._named: dict[tuple[str, str], Named] = {}
        self._meters = Meters()
        self._workers: dict[str, tuple[WorkerStatus, int]] = {}
        self._usage = UsageBook()
        self._listeners: list[Callable[[str, Event], None]] = []
        #: Ends of jobs that have a webhook or whose tenant is in `webhook_tenants`, oldest first.
        self.outbox: list[OutboxEvent] = []
        #: Tenants with endpoints.
        self.webhook_tenants: set[str] = set()

    def subscribe(self, callback: Callable[[str, Event], None]) -> Callable[[], None]:
        """Have every published event told, in order, from whatever thread causes it.

        Returns what ends it.
        """
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    @property
    def _lease_ms(self) -> int:
        return int(self._settings.lease_ttl_s * 1000)

    def _policy(self, tenant: str) -> TenantPolicy:
        return self._policies.get(tenant) or self._policies.get("*") or self._default

    def _find(self, job_id: str) -> Record | None:
        record = self._records.get(job_id)
        if record and record.expires_ms is not None and record.expires_ms <= self._clock_ms():
            del self._records[job_id]
            self._expired[job_id] = record.job.tenant
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
        self._meters.settle(record.limits, outcome.taken - record.job.cost, now)
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
        self._announce(record.job, now)
        self._usage.tally(record.job, now)
        if record.job.erased_ms:
            self._wipe(record)

    def _wipe(self, record: Record) -> None:
        """Take the content out of an ended job."""
        record.job = replace(record.job, body=b"", metadata=b"{}", output=None, webhook=b"")
        while len(record.log) > 1:
            record.log.popleft()
        record.text = ""
        record.expires_ms = self._clock_ms() + STUB_S * 1000

    def _announce(self, job: Job, now: int) -> None:
        wanted = job.webhook or job.tenant in self.webhook_tenants
        if wanted and len(self.outbox) < MOST_EVENTS:
            event = OutboxEvent(
                type=f"job.{job.status}",
                tenant=job.tenant,
                ms=now,
                job=job.id,
                seq=job.seq,
                webhook=job.webhook.decode(),
            )
            self.outbox.append(event)

    def announce(self, event: OutboxEvent) -> bool:
        """Have webhooks told; False when nobody of the tenant wants to hear of anything."""
        wanted = event.tenant in self.webhook_tenants
        if wanted and len(self.outbox) < MOST_EVENTS:
            self.outbox.append(event)
        return wanted

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
            state.fair.settle(job.band, job.tenant, 0, lease.charged, policy.weight)
        state.unpark(job.tenant, policy.max_in_flight)
        if lease.cancel:
            self._finish(record, Outcome(status=Status.CANCELLED))
        elif job.attempt - record.refunds >= job.max_attempts:
            message = f"The job was started {job.attempt} times and its worker was lost each time."
            error = JobError(code="max_attempts", message=message)
            self._finish(record, Outcome(status=Status.FAILED, error=error))
            state.bury(record.job, error.code, now)
        else:
            state.waiting[job.tenant] += 1
            self._advance(record, EventType.REQUEUED, status=Status.QUEUED, refunds=record.refunds)
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

    def _expire(self, state: ModelQueue) -> None:
        """End waiting jobs whose deadline has passed."""
        now = self._clock_ms()
        waiting = [job_id for since in state.since.values() for job_id in since]
        for record in [self._records[job_id] for job_id in (*waiting, *state.delayed)]:
            if 0 < record.job.deadline_ms <= now:
                state.unwait(record.job)
                message = "The job was not started before its deadline."
                error = JobError(code="deadline_exceeded", message=message)
                self._finish(record, Outcome(status=Status.EXPIRED, error=error))

    def _check_room(self, queue: str, tenant: str, band: Band) -> None:
        """Raises `QueueFullError` or `QueueDrainingError` when one more job can't wait."""
        state = self._queues[queue]
        if state.mode == "draining":
            raise QueueDrainingError("the queue takes no new jobs")
        bound, mark = self._policy(tenant).max_queued, self._marks[band]
        if state.waiting[tenant] >= bound:
            wait = tenant_wait_ms(self._outlook(state, tenant, band), band, bound)
            raise QueueFullError("tenant", bound, wait)
        waiting = sum(state.waiting.values())
        if waiting >= mark:
            outlook = self._outlook(state, tenant, band)
            raise OverloadedError(band, mark, queue_wait_ms(outlook, waiting, mark))

    def _check_limits(self, record: Record) -> None:
        """Raises `RateLimitedError` when a limit doesn't let a job in."""
        job, now = record.job, self._clock_ms()
        refused = self._meters.weigh(record.limits, job.cost, now)
        if refused:
            (scope, kind, _), limit, wait = refused
            states = self._meters.states(record.limits, now)
            raise RateLimitedError(scope, kind, limit, ceil(wait), states)
        jobs = sum(
            state.waiting[job.tenant] + state.running[job.tenant] for state in self._queues.values()
        )
        jobs -= sum(
            other.batch_line and other.job.tenant == job.tenant and not other.job.is_terminal
            for other in (self._records.values() if record.max_jobs else ())
        )
        of_key = sum(
            other.key_max_jobs > 0 and other.job.key_id == job.key_id and not other.job.is_terminal
            for other in (self._records.values() if record.key_max_jobs else ())
        )
        bounds = (("tenant", record.max_jobs, jobs), ("key", record.key_max_jobs, of_key))
        for whose, bound, count in bounds:
            if 0 < bound <= count:
                outlook = self._outlook(self._queues[job.model], job.tenant, job.band)
                wait_ms = tenant_wait_ms(outlook, job.band, bound)
                states = self._meters.states(record.limits, now)
                raise RateLimitedError(whose, "jobs", bound, wait_ms, states)

    def _outlook(self, state: ModelQueue, tenant: str, band: Band) -> Outlook:
        now = self._clock_ms()
        oldest = [since for each in state.since.values() for since in each.values()]
        head = state.lists.get((band, tenant), [""])[0]
        queue, own = state.drains.get(None), state.drains.get(tenant)
        race = state.fair.bands[band].active
        rivals = sorted(race, key=lambda each: (race[each], each.encode()))[:RIVALS]
        return Outlook(
            now_ms=now,
            queue=queue and queue.seen(now, min(oldest, default=now)),
            tenant=own and own.seen(now, state.since[band].get(head, now)),
            racing=tuple(len(state.fair.bands[each].active) for each in BANDS),
            parked=tenant in state.parked,
            part=part_of_band(
                self._policy(tenant).weight,
                [self._policy(each).weight for each in rivals],
                len(race),
                races=tenant in race,
            ),
        )

    def _revive(self, record: Record, deadline_ms: int) -> int:
        """Start a failed or expired job's life again; its position."""
        job, state = record.job, self._queues[record.job.model]
        state.unbury(job.id)
        record.refunds, record.batch_line = job.attempt, False
        self._meters.take(record.limits, job.cost, self._clock_ms())
        record.expires_ms, record.text, record.since_ms = None, "", self._clock_ms()
        self._advance(
            record,
            EventType.QUEUED,
            status=Status.QUEUED,
            output=None,
            error=None,
            usage=Usage(),
            started_ms=0,
            finished_ms=0,
            deadline_ms=deadline_ms,
            refunds=record.refunds,
        )
        state.waiting[job.tenant] += 1
        return state.put(record.job, self._clock_ms(), head=False) - 1

    def _letters(self, queue: str, tenant: str | None, job_id: str | None) -> list[DeadLetter]:
        """Dead letters, oldest first."""
        state = self._queues.get(queue)
        return [
            letter
            for letter in (state.dead if state else ())
            if tenant in (None, letter.tenant) and job_id in (None, letter.job_id)
        ]
