"""Celery's message for a claimed job, made at claim time: nothing is stored per message."""

from __future__ import annotations

from typing import Any

from kombu.transport import virtual

from broker.jobs import Claim

#: The task every job runs as.
TASK = "forebay.run_job"

_NO_CANVAS: dict[str, None] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: Headers of Celery's message protocol 2 that are the same for every job. The id and the rest are
#: added per job; Celery copies the dict before it changes anything.
_HEADERS: dict[str, Any] = {
    "lang": "py",
    "task": TASK,
    "parent_id": None,
    "group": None,
    "shadow": None,
    "eta": None,
    "expires": None,
    "retries": 0,
    "timelimit": [None, None],
    "kwargsrepr": "{}",
    "origin": "forebay",
    "ignore_result": True,
}


def delivery_tag(claim: Claim) -> str:
    """`<job id>:<attempt>`: names the lease, not just the job."""
    return f"{claim.job.id}:{claim.attempt}"


def is_lease(tag: str) -> bool:
    """Whether a delivery tag names a lease; kombu's own tags are UUIDs."""
    return ":" in tag


class JobMessage(virtual.Message):  # type: ignore[misc]
    """`forebay.run_job(<job id>)`. The task finds all else in the lease, by that id."""

    def __init__(self, claim: Claim, channel: Any) -> None:
        job_id = claim.job.id
        payload: Any = ([job_id], {}, _NO_CANVAS)
        # Past virtual.Message, which decodes what came over the wire. Nothing did: without a
        # content type Celery takes the body as it is.
        super(virtual.Message, self).__init__(
            body=payload,
            delivery_tag=delivery_tag(claim),
            delivery_info={
                "exchange": "",
                "routing_key": claim.queue,
                "redelivered": claim.attempt > 1,
            },
            properties={"correlation_id": job_id, "reply_to": None, "priority": 0},
            headers=_HEADERS | {"id": job_id, "root_id": job_id, "argsrepr": f"('{job_id}',)"},
            channel=channel,
        )
        self._decoded_cache = payload
