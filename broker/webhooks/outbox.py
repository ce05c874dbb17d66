"""What happened and has to be told: written in the same step as the event itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson

#: Most events in the outbox. It only fills while no webhook worker runs; what comes then is counted
#: (`overflowed`) and not told.
MOST_EVENTS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxEvent:
    """One entry, as the scripts write it."""

    #: `job.<status>`, `batch.<status>` or `webhook_endpoint.disabled`.
    type: str
    tenant: str
    #: When it happened (Unix milliseconds).
    ms: int
    #: The job that ended, and the sequence number of its terminal event.
    job: str = ""
    seq: int = 0
    #: The job's own webhook as JSON, if it has one.
    webhook: str = ""
    #: The endpoint that was disabled, and why: `gone` or `failing`.
    endpoint: str = ""
    reason: str = ""
    #: The batch that ended.
    batch: str = ""

    @classmethod
    def from_json(cls, raw: bytes) -> OutboxEvent:
        fields: Mapping[str, Any] = orjson.loads(raw)
        return cls(**{**fields, "ms": int(fields["ms"]), "seq": int(fields.get("seq", 0))})

    def to_json(self) -> bytes:
        """Only what it has: a version that knows less reads it as well."""
        return orjson.dumps({name: value for name, value in asdict(self).items() if value})

    @property
    def id(self) -> str:
        """`evt_…`: the same each time this event is looked at; the `webhook-id` of its messages."""
        if self.job:
            return f"evt_{self.job.removeprefix('job_')}_{self.seq}"
        if self.batch:
            # It ends once.
            return f"evt_{self.batch}"
        return f"evt_{self.endpoint.removeprefix('wep_')}_{self.ms}"
