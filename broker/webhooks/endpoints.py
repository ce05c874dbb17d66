"""Endpoints as the webhook worker knows them: copies in Redis of what the database holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson

#: Of a single job.
JOB_EVENT_TYPES = ("job.completed", "job.failed", "job.cancelled", "job.expired")
#: As OpenAI has them: of a response that ran in the background, and of a batch.
RESPONSE_EVENT_TYPES = (
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
)
BATCH_EVENT_TYPES = ("batch.completed", "batch.failed", "batch.expired", "batch.cancelled")
#: Events an endpoint may ask for.
EVENT_TYPES = (
    *JOB_EVENT_TYPES,
    *RESPONSE_EVENT_TYPES,
    *BATCH_EVENT_TYPES,
    "webhook_endpoint.disabled",
)
#: All of them, those to come included.
ANY = "*"
#: Sent by a call alone, to one endpoint, whatever it has asked for.
TEST_EVENT = "webhook_endpoint.test"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signing:
    """Which versions of a secret sign now."""

    #: Counts rotations from 1; 0: nobody was ever shown a secret.
    version: int = 1
    #: Until then (Unix milliseconds) the version before signs as well.
    previous_until_ms: int = 0

    def versions(self, now_ms: int) -> tuple[int, ...]:
        """Newest first."""
        if self.version > 1 and now_ms < self.previous_until_ms:
            return (self.version, self.version - 1)
        return (self.version,)

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes | None) -> Signing:
        """Of a tenant's jobs; without a record nothing was shown yet."""
        return cls(**orjson.loads(raw)) if raw else cls(version=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a tenant wants events sent to."""

    #: `wep_…`
    id: str
    url: str
    #: Members of `EVENT_TYPES`, or `ANY`.
    event_types: tuple[str, ...]
    #: The output of completed jobs is sent along.
    include_output: bool = False
    enabled: bool = True
    signing: Signing = Signing()

    def wants(self, event_type: str) -> bool:
        return self.enabled and (ANY in self.event_types or event_type in self.event_types)

    def to_json(self) -> bytes:
        """Always the same bytes for the same endpoint: copies are compared by them."""
        return orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, raw: bytes) -> Endpoint:
        fields: dict[str, Any] = orjson.loads(raw)
        return cls(
            **{
                **fields,
                "event_types": tuple(fields["event_types"]),
                "signing": Signing(**fields["signing"]),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What the webhook worker has seen of an endpoint (Unix milliseconds, 0: never)."""

    #: First failure since the last success.
    failing_ms: int = 0
    succeeded_ms: int = 0
    failed_ms: int = 0
    disabled_ms: int = 0
    #: `gone` (it answered 410) or `failing` (for too long).
    reason: str = ""

    @classmethod
    def from_hash(cls, raw: Mapping[bytes, bytes]) -> Health:
        numbers = ("failing_ms", "succeeded_ms", "failed_ms", "disabled_ms")
        return cls(
            **{name: int(raw.get(name.encode()) or 0) for name in numbers},
            reason=raw.get(b"reason", b"").decode(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobWebhook:
    """The webhook that was given with a single job."""

    url: str
    event_types: tuple[str, ...] = JOB_EVENT_TYPES
    include_output: bool = False

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: str | bytes) -> JobWebhook:
        fields: dict[str, Any] = orjson.loads(raw)
        return cls(**{**fields, "event_types": tuple(fields["event_types"])})
