"""What the API says about jobs, as typed objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: States a job never leaves.
TERMINAL = frozenset({"completed", "failed", "cancelled", "expired"})
_TERMINAL_EVENTS = frozenset({f"job.{status}" for status in TERMINAL})


@dataclass(frozen=True, kw_only=True)
class RemoteJob:
    """A job object; `raw` has everything the API said."""

    id: str
    status: str
    model: str
    priority: str
    output: Any = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RemoteJob:
        return cls(
            id=raw["id"],
            status=raw["status"],
            model=raw.get("model", ""),
            priority=raw.get("priority", ""),
            output=raw.get("output"),
            error=raw.get("error"),
            usage=raw.get("usage") or {},
            raw=raw,
        )


@dataclass(frozen=True, kw_only=True)
class HourUsage:
    """Jobs that ended in one hour with one model, and their tokens."""

    #: Beginning of the hour (Unix seconds).
    hour: int
    model: str
    completed: int
    failed: int
    cancelled: int
    expired: int
    input_tokens: int
    #: Part of the input tokens.
    cached_tokens: int
    output_tokens: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> HourUsage:
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name != "raw"}
        return cls(**known, raw=raw)


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event of a job's stream."""

    #: Counts up within a job; what a resume continues after. 0 when the event has none.
    seq: int
    #: `job.queued`, `job.in_progress`, `job.delta`, `job.snapshot`, …
    type: str
    attempt: int
    #: New text of a `job.delta`; all text so far of a `job.snapshot`.
    text: str
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_terminal(self) -> bool:
        """Also true of the snapshot of a job that has ended: nothing comes after it."""
        return self.type in _TERMINAL_EVENTS or (
            self.type == "job.snapshot" and self.data.get("status") in TERMINAL
        )

    @property
    def job(self) -> RemoteJob | None:
        """The whole job, output and all, which the last event carries."""
        raw = self.data.get("job")
        return RemoteJob.from_json(raw) if isinstance(raw, dict) else None
