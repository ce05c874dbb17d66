"""The judgement of a chaos run: the client's ledger against what API and Redis say at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from broker import keys
from loadtests.chaos_client import Client, Entry
from loadtests.chaos_stack import ChaosStack

_ENDS = ("job.completed", "job.failed", "job.cancelled", "job.expired")
_TERMINAL = ("completed", "failed", "cancelled", "expired")
_AT_ONCE = 12
_SHOWN = 5


@dataclass(slots=True)
class Verdict:
    #: Accepted, and not to be found or never ended for good.
    lost: int = 0
    #: More than one end: events, states or outputs; or one submit that made two jobs.
    doubled: int = 0
    #: Numbers of events with gaps, repeats or out of order; text that isn't the output.
    disordered: int = 0
    #: Not terminal in time.
    stuck: int = 0
    #: Failed though nothing was wrong with the request.
    failed: int = 0
    attempts_max: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, kind: str, entry: Entry, what: object) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.notes) < _SHOWN * 4:
            self.notes.append(f"{kind}: {entry.id} ({entry.key}): {what}")


def order_fault(seqs: Sequence[int], last: int) -> str | None:
    """What is wrong with numbers that should be 1, 2, … `last`."""
    wrong = next((place for place, seq in enumerate(seqs, 1) if seq != place), None)
    if wrong is None and len(seqs) == last:
        return None
    place = wrong or min(len(seqs), last) + 1
    return f"{len(seqs)} events for {last}, wrong from place {place}: {seqs[place - 1 : place + 3]}"


def text_fault(events: Sequence[dict[str, Any]], job: dict[str, Any]) -> str | None:
    """Whether the text streamed by the last attempt differs from the output."""
    if job["status"] != "completed":
        return None
    attempt = job["attempt"]
    deltas = [e["text"] for e in events if e["type"] == "job.delta" and e["attempt"] == attempt]
    content = job["output"]["choices"][0]["message"]["content"]
    return None if "".join(deltas) == content else f"{len(deltas)} deltas don't join to the output"


def attempt_fault(events: Sequence[dict[str, Any]]) -> str | None:
    """Attempts that go backwards: something of a stale attempt got in."""
    attempts = [event["attempt"] for event in events]
    return None if attempts == sorted(attempts) else "attempts go backwards"


async def judge(client: Client, stack: ChaosStack, tenant_ids: dict[str, str]) -> Verdict:
    """Look at every accepted job by the API, and at the raw logs and lists in Redis."""
    verdict = Verdict()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(entry: Entry) -> None:
        async with gate:
            await _judge_job(entry, client, verdict)

    accepted = client.ledger.accepted
    await asyncio.gather(*(one(entry) for entry in accepted))
    await asyncio.to_thread(_judge_logs, accepted, stack, verdict)
    await asyncio.to_thread(_judge_submits, accepted, stack, tenant_ids, verdict)
    return verdict


async def _judge_job(entry: Entry, client: Client, verdict: Verdict) -> None:
    job = await client.read(entry)
    status = job["status"]
    verdict.ends[status] = verdict.ends.get(status, 0) + 1
    if status == "absent":
        verdict.note("lost", entry, "accepted, and the API doesn't know it")
        return
    if status not in _TERMINAL:
        verdict.note("stuck", entry, status)
        return
    verdict.attempts_max = max(verdict.attempts_max, job["attempt"])
    if status == "failed":
        verdict.note("failed", entry, job["error"])
    if status == "cancelled" and not entry.cancel_asked:
        verdict.note("lost", entry, "cancelled, and nobody asked for it")
    events = await client.log(entry)
    ends = [event["type"] for event in events if event["type"] in _ENDS]
    if ends != [f"job.{status}"]:
        verdict.note("doubled" if len(ends) > 1 else "lost", entry, f"{status}, events {ends}")
    last = int(events[-1]["seq"]) if events else 0
    fault = order_fault([event["seq"] for event in events], last) or attempt_fault(events)
    if fault is None and entry.followed:
        fault = order_fault(entry.followed, last)
    if fault is None and entry.stream:
        fault = text_fault(events, job)
    if fault:
        verdict.note("disordered", entry, fault)
    await client.read(entry)
    if len(entry.ends) > 1:
        verdict.note("doubled", entry, f"ended as {sorted(entry.ends)}")


def _judge_logs(accepted: list[Entry], stack: ChaosStack, verdict: Verdict) -> None:
    """The logs as they lie in Redis, also behind the end, where the API stops reading."""
    for entry in accepted:
        lines = stack.client.lrange(keys.events(entry.id), 0, -1)
        seq = int(stack.client.hget(keys.job(entry.id), "seq") or 0)
        events = [json.loads(line) for line in lines]
        ends = [event["type"] for event in events if event["type"] in _ENDS]
        if len(ends) > 1:
            verdict.note("doubled", entry, f"raw log has {ends}")
        fault = order_fault([1, *(event["seq"] for event in events)], seq)
        if fault:
            verdict.note("disordered", entry, f"raw log: {fault}")


def _judge_submits(
    accepted: list[Entry], stack: ChaosStack, tenant_ids: dict[str, str], verdict: Verdict
) -> None:
    """Jobs in Redis are exactly those the client was told of: no submit made two."""
    known = {entry.id for entry in accepted}
    if len(known) != len(accepted):
        verdict.doubled += len(accepted) - len(known)
        verdict.notes.append("doubled: two submits were answered with one job")
    for tenant_id in tenant_ids.values():
        listed: Any = stack.client.zrange(keys.tenant_jobs(tenant_id), 0, -1)
        ids = {job_id.decode() for job_id in listed}
        if extra := ids - known:
            verdict.doubled += len(extra)
            verdict.notes.append(f"doubled: jobs no client knows of: {sorted(extra)[:_SHOWN]}")
