"""Commands and replies as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from broker.jobs import Event, EventType

Arg = bytes | str | int | float


def decode_event(line: bytes) -> Event:
    """One line of a job's event log, or one message on its channel."""
    raw = orjson.loads(line)
    return Event(
        seq=raw["seq"],
        type=EventType(raw["type"]),
        attempt=raw["attempt"],
        text=raw.get("text", ""),
    )


def pack(commands: Sequence[Sequence[Arg]]) -> bytes:
    """Commands in the wire format (RESP), ready to be sent in one piece."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for arg in command:
            if isinstance(arg, str):
                arg = arg.encode()
            elif not isinstance(arg, bytes):
                arg = repr(arg).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(arg), arg))
    return b"".join(parts)


def pairs(flat: list[bytes] | dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Fields and values of a hash."""
    if isinstance(flat, dict):  # A client that speaks RESP3.
        return flat
    items = iter(flat)
    return dict(zip(items, items, strict=True))
