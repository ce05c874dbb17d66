"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping

from api.sdk.objects import JobEvent


async def parse(chunks: AsyncIterator[bytes]) -> AsyncIterator[JobEvent]:
    """Events from the bytes of a stream, however they are cut."""
    fields: dict[str, str] = {}
    # Chunks, not lines: a snapshot may be longer than the reader's line limit.
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.rstrip(b"\r").decode()
            if line:
                name, _, value = line.partition(":")
                if name:
                    value = value.removeprefix(" ")
                    joined = f"{fields[name]}\n{value}" if name in fields else value
                    fields[name] = joined if name == "data" else value
                continue
            if "data" in fields:
                yield _event(fields)
            fields = {}


def _event(fields: Mapping[str, str]) -> JobEvent:
    try:
        data = json.loads(fields["data"])
    except ValueError:
        data = {}
    if not isinstance(data, dict):
        data = {}
    seq = fields.get("id", "")
    return JobEvent(
        seq=int(seq) if seq.isdigit() else int(data.get("seq") or 0),
        type=fields.get("event") or str(data.get("type", "message")),
        attempt=int(data.get("attempt") or 0),
        text=str(data.get("text") or ""),
        data=data,
    )
