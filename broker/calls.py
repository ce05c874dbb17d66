"""Every operation of the queue as data: what to send, and what the answer means.

`RedisQueue` and `AsyncRedisQueue` differ only in how they send a `Call`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from broker import keys, scripts
from broker.call import Call, nothing, number, script_call, truth
from broker.jobs import Claim, Delta, Job, JobError, Outcome, Status
from broker.policies import TenantPolicy
from broker.queue import LeaseState
from broker.stats import Claimable
from broker.submitting_calls import SubmittingCalls
from broker.wire import Arg, pairs

#: Leases given back by one script call.
RELEASE_BATCH = 500
#: Ids looked at by one sweep, about.
SWEEP_BATCH = 200
#: A wake-up that its worker doesn't hear is of no use for longer.
WAKE_MS = 10_000
#: Largest output that goes out with the message of a job's end (bytes).
MOST_TOLD_BYTES = 16_384

_LEASE_STATES: tuple[LeaseState, ...] = ("ok", "lost", "cancel")


class Calls(SubmittingCalls):
    """The calls under given settings; no I/O."""

    # -- working side -----------------------------------------------------------------------------
    def claim(
        self, queue: str, owner: str, limit: int, batch_room: int | None = None
    ) -> Call[list[Claim]]:
        return script_call(
            scripts.CLAIM, lambda reply, _: self.decode_claims(queue, reply), (keys.base(queue),),
            owner, self._lease_ms, limit, self._weight, self._cap,
            limit if batch_room is None else batch_room,
        )  # fmt: skip

    def wake(self, queue: str, owner: str) -> Call[None]:
        key = keys.wake(queue, owner)
        return Call((("RPUSH", key, 1), ("PEXPIRE", key, WAKE_MS)), lambda replies, _: None)

    @staticmethod
    def decode_claims(queue: str, reply: list[Any]) -> list[Claim]:
        return [
            Claim(queue=queue, job=Job.from_hash(reply[k].decode(), pairs(reply[k + 1])))
            for k in range(0, len(reply) - 1, 2)
        ]

    @staticmethod
    def more_waits(reply: list[Any]) -> bool:
        return len(reply) % 2 == 1

    def renew(
        self, queue: str, owner: str, leases: Sequence[tuple[str, int]]
    ) -> Call[dict[str, LeaseState]]:
        def decode(reply: Any, _: bool) -> dict[str, LeaseState]:
            return {
                lease[0]: _LEASE_STATES[state] for lease, state in zip(leases, reply, strict=True)
            }

        flat = (part for lease in leases for part in lease)
        return script_call(scripts.RENEW, decode, (keys.base(queue),), owner, self._lease_ms, *flat)

    def emit(self, queue: str, deltas: Sequence[Delta]) -> Call[list[str]]:
        flat: list[Arg] = []
        for delta in deltas:
            start = -1 if delta.start is None else delta.start
            flat += (delta.job_id, delta.attempt, start, delta.text.encode(errors="replace"))
        return script_call(
            scripts.EMIT, lambda reply, _: [raw.decode() for raw in reply], (keys.base(queue),),
            *flat, repeatable=all(delta.start is not None for delta in deltas),
        )  # fmt: skip

    def complete(self, claim: Claim, outcome: Outcome, *, dead_code: str = "") -> Call[bool]:
        used = outcome.usage
        fields: list[Arg] = ["usage", orjson.dumps(used)]
        if outcome.output is not None:
            fields += ("output", outcome.output)
        if outcome.error is not None:
            fields += ("error", orjson.dumps(outcome.error))
        if outcome.answer:
            fields += ("answer", outcome.answer)
        return script_call(
            scripts.COMPLETE, truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, outcome.status, outcome.taken,
            self._weight, self._cap, dead_code, _told(claim.job, outcome),
            used.input_tokens, used.cached_tokens, used.output_tokens, *fields,
        )  # fmt: skip

    def bury(self, claim: Claim, error_code: str, message: str) -> Call[bool]:
        error = JobError(code=error_code, message=message)
        outcome = Outcome(status=Status.FAILED, error=error)
        return self.complete(claim, outcome, dead_code=error_code)

    def requeue(self, claim: Claim, delay_ms: int, refund: bool) -> Call[bool]:
        return script_call(
            scripts.REQUEUE, truth, (keys.base(claim.queue),),
            claim.job.id, claim.attempt, delay_ms, int(refund), self._weight, self._cap,
        )  # fmt: skip

    def release_owner(self, queue: str, owner: str) -> Call[int]:
        """At most `RELEASE_BATCH` leases; to be called until fewer come back."""
        return script_call(
            scripts.RELEASE_OWNER, number, (keys.base(queue),), owner, RELEASE_BATCH, self._cap
        )

    def sweep(self, queue: str) -> Call[int]:
        return script_call(scripts.SWEEP, number, (keys.base(queue),), self._cap, SWEEP_BATCH)

    def count_claimable(self, queue: str, most: int, batch_room: int | None) -> Call[Claimable]:
        return script_call(
            scripts.COUNT_CLAIMABLE, lambda reply, _: Claimable(*reply), (keys.base(queue),),
            self._cap, most, "" if batch_room is None else batch_room,
        )  # fmt: skip

    # -- policy and readings ----------------------------------------------------------------------
    def set_policy(
        self, tenant: str, policy: TenantPolicy | None, queues: Sequence[str]
    ) -> Call[None]:
        values = (policy.weight, policy.max_in_flight, policy.max_queued) if policy else ()
        return script_call(
            scripts.SET_POLICY, nothing, [keys.base(queue) for queue in queues],
            tenant, self._cap, *values,
        )  # fmt: skip

    def ping(self) -> Call[None]:
        return Call((("PING",),), lambda replies, _: None)

    def load_scripts(self) -> Call[None]:
        commands = tuple(("SCRIPT", "LOAD", script.source) for script in scripts.ALL)
        return Call(commands, lambda replies, _: None)


def _told(job: Job, outcome: Outcome) -> bytes:
    """Members of the last message that spare a waiting caller the reading of the record.

    Streams have told their text already; what is large is read by those who want it.
    """
    output = outcome.output
    if outcome.status is not Status.COMPLETED or output is None or job.stream:
        return b""
    if len(output) > MOST_TOLD_BYTES:
        return b""
    members = orjson.dumps(
        {
            "created_ms": job.created_ms,
            "started_ms": job.started_ms,
            "output": output.decode(errors="replace"),
        }
    )
    return b"," + members[1:-1]
