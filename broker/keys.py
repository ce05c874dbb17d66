"""Every Redis key and channel of Forebay, by name. One cell is one primary (docs/decisions/0002).

Queue keys are `fb:{<queue>}:<part>`; the Lua scripts get the base as KEYS[1] and build the rest
with the same suffixes (see `broker/lua/_prelude.lua`).
"""

from __future__ import annotations

#: String: `<major>.<minor>` of the layout of all keys; written by the first process.
SCHEMA = "fb:schema"
#: Set of all queue names that were ever used.
QUEUES = "fb:queues"
#: Hashes: tenant -> value; field `*` is the default.
POLICY_WEIGHT = "fb:policy:weight"
POLICY_CAP = "fb:policy:cap"
POLICY_MAX_QUEUED = "fb:policy:max_queued"
#: Sorted set: owner -> last seen (ms).
WORKERS = "fb:workers"
#: Pub/sub: accounts changed (a tenant or key was made, changed or revoked).
ACCOUNTS_CHANNEL = "fb:accounts"


def base(queue: str) -> str:
    return f"fb:{{{queue}}}:"


def bell(queue: str) -> str:
    """List with at most one element: work was put in."""
    return f"{base(queue)}bell"


def batch_bell(queue: str) -> str:
    """The same for workers that have room for batch jobs, where the one that looked had none."""
    return f"{base(queue)}bell:batch"


def wake(queue: str, owner: str) -> str:
    """List with expiry: a worker that waits has room for batch jobs again."""
    return f"{base(queue)}wake:{owner}"


def cancels(queue: str) -> str:
    """Pub/sub channel: ids of running jobs whose cancel is wanted."""
    return f"{base(queue)}cancel"


def job(job_id: str) -> str:
    """Hash: the job record."""
    return f"fb:job:{job_id}"


def events(job_id: str) -> str:
    """List: the job's events from seq 2 on, as published; trimmed at the head."""
    return f"fb:job:{job_id}:events"


def text(job_id: str) -> str:
    """String: text of the running attempt so far (streaming jobs)."""
    return f"fb:job:{job_id}:text"


def channel(job_id: str) -> str:
    """Pub/sub channel of a job's events."""
    return f"fb:ev:{job_id}"


def tenant_jobs(tenant: str) -> str:
    """Sorted set: job id -> created (ms)."""
    return f"fb:tenant:{tenant}:jobs"


def idempotency(tenant: str, digest: str) -> str:
    """String with expiry: `<fingerprint>|<job id>` of a tenant's idempotency key."""
    return f"fb:idem:{tenant}:{digest}"


def limits(scope: str, owner: str) -> str:
    """Hash with expiry: theoretical arrival times of `requests` and `tokens`; scope `t` or `k`."""
    return f"fb:limit:{scope}:{owner}"


def key_jobs(key_id: str) -> str:
    """Set: ids of the jobs of an API key that has a bound of jobs at once, until they end."""
    return f"fb:key:{key_id}:jobs"


def conversation(conversation_id: str) -> str:
    """Hash with expiry: owner, metadata, the job that is pending, number of places given out."""
    return f"fb:conv:{conversation_id}"


def conversation_items(conversation_id: str) -> str:
    """Hash with expiry: item id -> `<place>|<JSON>`."""
    return f"fb:conv:{conversation_id}:items"


def worker(owner: str) -> str:
    """String with expiry: a worker's status as JSON."""
    return f"fb:worker:{owner}"
