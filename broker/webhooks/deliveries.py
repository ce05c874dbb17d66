"""A delivery: one event on its way to one URL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Literal

import orjson

from broker.webhooks.urls import origin

State = Literal["pending", "delivered", "failed", "discarded"]

#: Attempts kept with a delivery: the newest.
TRIES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """How one attempt ended; nothing of an answer is kept but its status."""

    #: When it began (Unix milliseconds).
    ms: int
    duration_ms: int
    #: HTTP status; 0 when there was no answer.
    status: int = 0
    #: `timeout`, `connection_failed`, `address_blocked`, `http_status`, …; empty: it succeeded.
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDelivery:
    """What is to be sent where; bytes and id stay the same over all attempts."""

    tenant: str
    url: str
    event_id: str
    event_type: str
    body: bytes
    #: Empty for a webhook of a single job.
    endpoint: str = ""
    job: str = ""
    #: Longest the ended delivery is kept (s), where that is less than the log's own time.
    keep_s: int = 0

    @property
    def id(self) -> str:
        """`whd_…`, made of the event and where it goes: made twice it is still one."""
        where = self.endpoint or f"job:{self.url}"
        digest = blake2b(f"{self.event_id}\0{where}".encode(), digest_size=13)
        return f"whd_{digest.hexdigest()}"

    @property
    def group(self) -> str:
        """What is bounded together: an endpoint, or a tenant's single webhooks to one origin."""
        if self.endpoint:
            return self.endpoint
        digest = blake2b(origin(self.url).encode(), digest_size=8).hexdigest()
        return f"{self.tenant}:{digest}"

    @property
    def log(self) -> str:
        return self.endpoint or job_log(self.tenant)


def job_log(tenant: str) -> str:
    """The log of the webhooks of a tenant's single jobs."""
    return f"jobs:{tenant}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A delivery as Redis has it. Times are Unix milliseconds, 0 when not yet."""

    id: str
    tenant: str
    url: str
    event_id: str
    event_type: str
    endpoint: str
    job: str
    state: State
    #: Starts so far; the fencing token of the one under way.
    attempt: int
    #: Failed attempts since it was made, or asked for again.
    failures: int
    created_ms: int
    next_ms: int
    ended_ms: int
    keep_s: int
    #: Newest last.
    tries: tuple[Try, ...] = ()
    body: bytes = field(default=b"", repr=False)

    @classmethod
    def from_hash(cls, delivery_id: str, raw: Mapping[bytes, bytes]) -> Delivery:
        def text(name: bytes) -> str:
            return raw.get(name, b"").decode()

        def number(name: bytes) -> int:
            return int(float(raw.get(name) or 0))

        state: State = text(b"state")  # type: ignore[assignment]
        return cls(
            id=delivery_id,
            tenant=text(b"tenant"),
            url=text(b"url"),
            event_id=text(b"event_id"),
            event_type=text(b"event_type"),
            endpoint=text(b"endpoint"),
            job=text(b"job"),
            state=state,
            attempt=number(b"attempt"),
            failures=number(b"failures"),
            created_ms=number(b"created_ms"),
            next_ms=number(b"next_ms"),
            ended_ms=number(b"ended_ms"),
            keep_s=number(b"keep_s"),
            tries=tuple(Try(**each) for each in orjson.loads(raw.get(b"tries") or b"[]")),
            body=raw.get(b"body", b""),
        )

    def tries_with(self, one: Try) -> bytes:
        """JSON of its attempts and one more."""
        return orjson.dumps([asdict(each) for each in (*self.tries, one)][-TRIES:])
