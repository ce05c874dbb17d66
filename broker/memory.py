"""The queue in memory: the twin of the Lua scripts, for tests and for understanding them.

One process, one lock; state is lost with the object. `fairness.py` makes the choices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from broker.errors import (
    DuplicateJobError,
    IdempotencyConflictError,
    JobNotFoundError,
    NotRetryableError,
    QueueDrainingError,
    QueueFullError,
)
from broker.fairness import LEAST_TOKENS
from broker.idempotency import LIFETIME_MS, digests
from broker.jobs import (
    Accepted,
    Band,
    Claim,
    Delta,
    EventType,
    Job,
    JobError,
    NewJob,
    Outcome,
    Status,
)
from broker.memory_async import AsyncMemoryQueue
from broker.memory_readings import MemoryReadings
from broker.memory_state import Lease, ModelQueue, Named, new_record
from broker.policies import TenantPolicy
from broker.queue import CancelResult, LeaseState
from broker.stats import QueueMode

__all__ = ["AsyncMemoryQueue", "MemoryQueue"]


class MemoryQueue(MemoryReadings):
    """`JobQueue` without Redis; thread-safe."""

    # -- submitting side --------------------------------------------------------------------------
    def enqueue(self, job: NewJob) -> Accepted:
        with self._lock:
            queue = self._queues.setdefault(job.model, ModelQueue())
            position = len(queue.lists.get((job.band, job.tenant), ()))
            now = self._clock_ms()
            record = new_record(job, now)
            name, request = digests(job)
            known = self._named.get((job.tenant, name))
            if name and known and known.expires_ms > now:
                if known.request != request:
                    raise IdempotencyConflictError(known.job_id)
                mine = known.job_id == job.id
                return Accepted(
                    job_id=known.job_id,
                    position=max(position - 1, 0) if mine else 0,
                    replayed=not mine,
                    limits=self._meters.states(record.limits, now),
                )
            if self._find(job.id):
                raise DuplicateJobError(job.id)
            self._check_limits(record)
            self._check_room(job.model, job.tenant, job.band)
            self._records[job.id] = record
            self._meters.take(record.limits, job.cost, now)
            if name:
                self._named[job.tenant, name] = Named(request, job.id, now + LIFETIME_MS)
            queue.waiting[job.tenant] += 1
            if job.delay_ms > 0:
                queue.delayed[job.id] = now + job.delay_ms
            else:
                queue.put(record.job, now, head=False)
            return Accepted(
                job_id=job.id,
                position=position,
                limits=self._meters.states(record.limits, now),
            )

    def cancel(self, job_id: str, *, tenant: str | None = None) -> CancelResult:
        with self._lock:
            record = self._owned(job_id, tenant)
            job = record.job
            queue = self._queues[job.model]
            if job.status is Status.QUEUED:
                queue.unwait(job)
                self._finish(record, Outcome(status=Status.CANCELLED))
                return "cancelled"
            if job.status is Status.IN_PROGRESS:
                queue.leases[job_id].cancel = True
                self._advance(record, EventType.CANCELLING, status=Status.CANCELLING)
            return "terminal" if job.is_terminal else "cancelling"

    def cancel_many(
        self, job_ids: Sequence[str], *, tenant: str | None = None
    ) -> dict[str, CancelResult]:
        with self._lock:
            results: dict[str, CancelResult] = {}
            for job_id in job_ids:
                with suppress(JobNotFoundError):
                    results[job_id] = self.cancel(job_id, tenant=tenant)
            return results

    def erase(self, job_id: str, *, tenant: str | None = None) -> bool:
        with self._lock:
            record = self._owned(job_id, tenant)
            erased_ms = record.job.erased_ms or self._clock_ms()
            record.job = replace(record.job, erased_ms=erased_ms)
            self._queues[record.job.model].unbury(job_id)
            if self.cancel(job_id) == "cancelling":
                record.job = replace(record.job, body=b"", metadata=b"{}")
                return False
            self._wipe(record)
            return True

    def retry(self, job_id: str, *, tenant: str | None = None, deadline_ms: int = 0) -> Accepted:
        with self._lock:
            record = self._owned(job_id, tenant)
            if record.job.erased_ms:
                raise NotRetryableError(job_id, "erased")
            if record.job.status not in (Status.FAILED, Status.EXPIRED):
                raise NotRetryableError(job_id, record.job.status)
            self._check_limits(record)
            self._check_room(record.job.model, record.job.tenant, record.job.band)
            position = self._revive(record, deadline_ms)
            limits = self._meters.states(record.limits, self._clock_ms())
            return Accepted(job_id=job_id, position=position, limits=limits)

    # -- dead letters -----------------------------------------------------------------------------
    def replay_dead(
        self,
        queue: str,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
        limit: int = 1_000,
    ) -> list[str]:
        with self._lock:
            replayed: list[str] = []
            for letter in self._letters(queue, tenant, job_id):
                record = self._find(letter.job_id)
                if record is None or len(replayed) >= limit:
                    continue
                try:
                    self._check_room(queue, record.job.tenant, record.job.band)
                except (QueueFullError, QueueDrainingError):
                    break
                self._revive(record, 0)
                replayed.append(letter.job_id)
            return replayed

    def purge_dead(
        self, queue: str, *, tenant: str | None = None, job_id: str | None = None
    ) -> int:
        with self._lock:
            letters = self._letters(queue, tenant, job_id)
            for letter in letters:
                self._queues[queue].dead.remove(letter)
            return len(letters)

    # -- working side -----------------------------------------------------------------------------
    def claim(
        self, queue: str, owner: str, *, limit: int = 1, batch_room: int | None = None
    ) -> list[Claim]:
        with self._lock:
            state = self._queues.setdefault(queue, ModelQueue())
            self._reclaim(state)
            self._promote(state)
            self._expire(state)
            claims: list[Claim] = []
            if state.mode == "paused":
                return claims
            state.fair.balance()
            room = limit if batch_room is None else batch_room
            while len(claims) < limit:
                full = (Band.BATCH,) if room <= 0 else ()
                choice = state.fair.choose(
                    lambda band, tenant: self._head(state, band, tenant).cost, full
                )
                if choice is None:
                    break
                if state.running[choice[1]] >= self._policy(choice[1]).max_in_flight:
                    state.park(choice[1])
                else:
                    job = self._start(state, self._head(state, *choice), owner, full)
                    room -= choice[0] is Band.BATCH
                    claims.append(Claim(queue=queue, job=job))
            return claims

    def wake(self, queue: str, owner: str) -> None:
        """Nobody waits here."""

    def _start(self, state: ModelQueue, job: Job, owner: str, full: Collection[Band]) -> Job:
        policy = self._policy(job.tenant)
        charged = state.fair.start(job.band, job.tenant, job.cost, policy.weight, full)
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
                    self._count_stale(queue)
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
                return self._refuse(claim, record is not None and record.ended == claim.attempt)
            job, state = record.job, self._queues[claim.queue]
            policy = self._policy(job.tenant)
            self._unlease(state, job)
            taken = max(outcome.taken, LEAST_TOKENS)
            state.fair.settle(job.band, job.tenant, taken, lease.charged, policy.weight)
            state.drain(job.tenant, self._clock_ms(), record.since_ms, taken)
            if outcome.status is Status.COMPLETED:
                state.fair.learn(job.tenant, job.cost, taken)
            state.unpark(job.tenant, policy.max_in_flight)
            record.ended = claim.attempt
            self._finish(record, outcome)
            if dead and not job.erased_ms:
                code = outcome.error.code if outcome.error else ""
                state.bury(job, code, self._clock_ms())
            return True

    def _refuse(self, claim: Claim, done: bool) -> bool:
        """Answer a write without a lease; `done`: it repeats what this attempt did before."""
        if not done:
            self._count_stale(claim.queue)
        return done

    def _count_stale(self, queue: str) -> None:
        self._queues.setdefault(queue, ModelQueue()).stale += 1

    def requeue(self, claim: Claim, *, delay_ms: int = 0, refund: bool = False) -> bool:
        with self._lock:
            lease = self._lease(claim.queue, claim.job.id, claim.attempt)
            record = self._find(claim.job.id)
            if record is None or lease is None:
                return self._refuse(claim, record is not None and record.released == claim.attempt)
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
            self._expire(state)
            state.forget_rates(self._clock_ms())
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

    def pause(self, queue: str) -> None:
        self._set_mode(queue, "paused")

    def drain(self, queue: str) -> None:
        self._set_mode(queue, "draining")

    def resume(self, queue: str) -> None:
        self._set_mode(queue, "running")

    def _set_mode(self, queue: str, mode: QueueMode) -> None:
        with self._lock:
            self._queues.setdefault(queue, ModelQueue()).mode = mode
