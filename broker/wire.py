"""Commands and replies as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from hiredis import pack_command

from broker.jobs import Ending, Event, EventType

Arg = bytes | str | int | float


def decode_event(line: bytes) -> Event:
    """One line of a job's event log, or one message on its channel."""
    raw = orjson.loads(line)
    return Event(
        seq=raw["seq"],
        type=EventType(raw["type"]),
        attempt=raw["attempt"],
        text=raw.get("text", ""),
        ending=_ending(raw) if "output" in raw else None,
    )


def _ending(raw: dict[str, Any]) -> Ending:
    return Ending(
        created_ms=raw["created_ms"],
        started_ms=raw["started_ms"],
        finished_ms=raw["finished_ms"],
        output=raw["output"].encode(),
    )


def pack(commands: Iterable[Sequence[Arg]]) -> bytes:
    """Commands in the wire format (RESP), ready to be sent in one piece."""
    # The package's own types leave out that items may be of several kinds.
    return b"".join([pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type]


def pairs(flat: list[bytes] | dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Fields and values of a hash."""
    if isinstance(flat, dict):  # A client that speaks RESP3.
        return flat
    items = iter(flat)
    return dict(zip(items, items, strict=True))
