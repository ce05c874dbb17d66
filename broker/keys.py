"""Every Redis key and channel of Forebay, by name. One cell is one primary (docs/decisions/0002).

Queue keys are `fb:{<queue>}:<part>`; the Lua scripts get the base as KEYS[1] and build the rest
with the same suffixes (see `broker/lua/_keys.lua`).
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


def batch_lines(tenant: str) -> str:
    """Set: ids of a tenant's jobs that are lines of batches, until they end."""
    return f"fb:tenant:{tenant}:lines"


def conversation(conversation_id: str) -> str:
    """Hash with expiry: owner, metadata, the job that is pending, number of places given out."""
    return f"fb:conv:{conversation_id}"


def conversation_items(conversation_id: str) -> str:
    """Hash with expiry: item id -> `<place>|<JSON>`."""
    return f"fb:conv:{conversation_id}:items"


def tenant_conversations(tenant: str) -> str:
    """ZSET: conversation id -> when it expires (ms)."""
    return f"fb:tenant:{tenant}:convs"


def usage(tenant: str, day: int | str) -> str:
    """Hash with expiry: `<hour since 1970>|<model>` -> sums over jobs that ended in it."""
    return f"fb:usage:{tenant}:{day}"


def answer(tenant: str, digest: str) -> str:
    """String with expiry: the answer to a request whose answer is always the same."""
    return f"fb:answer:{tenant}:{digest}"


def answer_claim(tenant: str, digest: str) -> str:
    """String with expiry: the attempt that computes that answer now."""
    return f"fb:answer:{tenant}:{digest}:claim"


def tenant_answers(tenant: str) -> str:
    """Sorted set with expiry: key of a kept answer -> when it expires (ms)."""
    return f"fb:tenant:{tenant}:answers"


def worker(owner: str) -> str:
    """String with expiry: a worker's status as JSON."""
    return f"fb:worker:{owner}"


# -- webhooks --------------------------------------------------------------------------------------
#: List: what is still to be made into deliveries, as JSON; written with the event itself.
WEBHOOK_OUTBOX = "fb:webhook:outbox"
#: List with at most one element: there is something in the outbox, or due.
WEBHOOK_BELL = "fb:webhook:bell"
#: Set: tenants with endpoints.
WEBHOOK_TENANTS = "fb:webhook:tenants"
#: Hash: tenant -> which secrets sign webhooks of single jobs, as JSON.
WEBHOOK_JOB_SECRETS = "fb:webhook:job_secrets"
#: Sorted set: group of deliveries -> when its next one is due (ms); groups at their bound are out.
WEBHOOK_RING = "fb:webhook:ring"
#: Sorted set: delivery that is being sent -> when its lease runs out (ms).
WEBHOOK_LEASES = "fb:webhook:leases"
#: Hash: `g:<group>`, `t:<tenant>` -> deliveries being sent.
WEBHOOK_RUNNING = "fb:webhook:running"
#: Hash: `overflowed` (events that found the outbox full), `discarded` (deliveries beyond a bound).
WEBHOOK_COUNTS = "fb:webhook:counts"


def webhook_endpoints(tenant: str) -> str:
    """Hash: endpoint id -> its configuration as JSON; a copy of the database."""
    return f"fb:webhook:endpoints:{tenant}"


def webhook_health(endpoint: str) -> str:
    """Hash: since when an endpoint fails, when and why it was disabled (ms)."""
    return f"fb:webhook:health:{endpoint}"


def webhook_due(group: str) -> str:
    """Sorted set: waiting delivery of a group -> when it is due (ms)."""
    return f"fb:webhook:due:{group}"


def webhook_log(owner: str) -> str:
    """Sorted set: newest deliveries of an endpoint, or of a tenant's jobs -> when made (µs)."""
    return f"fb:webhook:log:{owner}"


def webhook_delivery(delivery_id: str) -> str:
    """Hash: a delivery, from its making until its time in the log is over."""
    return f"fb:webhook:delivery:{delivery_id}"
