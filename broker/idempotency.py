"""A tenant's own names for its requests, so that a repeat finds the job and makes no second one."""

from __future__ import annotations

from hashlib import blake2b

from broker.jobs import NewJob

#: How long a name is known, from its first use on.
LIFETIME_MS = 24 * 3_600_000


def digests(job: NewJob) -> tuple[str, str]:
    """Digests of a job's idempotency key and of what its request is; both empty without a key."""
    if not job.idempotency_key:
        return "", ""
    request = blake2b(digest_size=16)
    if job.fingerprint:
        request.update(job.fingerprint.encode())
    else:
        for part in (job.endpoint, job.model, job.band):
            request.update(part.encode() + b"\0")
        request.update(job.body)
    return name_digest(job.idempotency_key), request.hexdigest()


def name_digest(idempotency_key: str) -> str:
    return blake2b(idempotency_key.encode(), digest_size=16).hexdigest()
