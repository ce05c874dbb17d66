"""The bytes of a message: `{id, object, type, created_at, timestamp, data}`.

`timestamp` is what Standard Webhooks asks for, the others are what OpenAI's SDK unwraps. Messages
are thin: a job's output comes along only when it was asked for and fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from broker.webhooks.outbox import OutboxEvent

#: Fields of a job's record that a message is made of; the output only where it is wanted.
JOB_FIELDS = (
    "seq", "endpoint", "model", "band", "metadata", "created_ms", "started_ms",
    "attempt", "error", "usage", "result_ttl_s",
)  # fmt: skip

#: Workers answer it as a chat.
RESPONSES: Final = "/v1/responses"


def message(event_id: str, event_type: str, ms: int, data: Mapping[str, Any]) -> bytes:
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return orjson.dumps(
        {
            "id": event_id,
            "object": "event",
            "type": event_type,
            "created_at": ms // 1000,
            "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "data": data,
        }
    )


def job_message(
    event: OutboxEvent, record: Mapping[str, bytes], output: bytes | None, *, most_bytes: int
) -> bytes:
    """The message of a job's end; an output that makes it too large is left out, and that is said.
    So is that of a response, which only the API can put into its form.

    A record that is gone, or tells of a later life of the job (a retry), adds nothing.
    """
    data: dict[str, Any] = {
        "id": event.job,
        "object": "job",
        "status": event.type.removeprefix("job."),
        "completed_at": event.ms // 1000,
    }
    current = int(record.get("seq") or 0) == event.seq
    if current:
        data |= _details(record)
    data["urls"] = {"self": f"/v1/jobs/{event.job}"}
    if output is not None and current:
        with_output = {**data, "output": orjson.Fragment(output)}
        whole = message(event.id, event.type, event.ms, with_output)
        if len(whole) <= most_bytes and data["endpoint"] != RESPONSES:
            return whole
        data["output_omitted"] = True
    return message(event.id, event.type, event.ms, data)


def response_event(event: OutboxEvent, body: bytes | None, output: bytes | None) -> str | None:
    """What the end of a job is to those who know it as a response; None: nothing.

    It is told of responses that ran in the background, as OpenAI does; `body` and `output` are
    those of the job's record, None where they have been erased.
    """
    if body is None or not orjson.loads(body).get("response", {}).get("background"):
        return None
    status = event.type.removeprefix("job.")
    if status == "completed":
        choices = orjson.loads(output or b"{}").get("choices") or [{}]
        cut = choices[0].get("finish_reason") == "length"
        return "response.incomplete" if cut else "response.completed"
    return "response.cancelled" if status == "cancelled" else "response.failed"


def response_id(job_id: str) -> str:
    """The job's name at `/v1/responses`."""
    return f"resp_{job_id.removeprefix('job_')}"


def _details(record: Mapping[str, bytes]) -> dict[str, Any]:
    def seconds(name: str) -> int | None:
        return int(record[name]) // 1000 if record.get(name) else None

    usage = orjson.loads(record["usage"]) if record.get("usage") else None
    if usage is not None:
        usage["total_tokens"] = usage["input_tokens"] + usage["output_tokens"]
    return {
        "endpoint": record["endpoint"].decode(),
        "model": record["model"].decode(),
        "priority": record["band"].decode(),
        "metadata": orjson.loads(record.get("metadata") or b"{}"),
        "created_at": seconds("created_ms"),
        "started_at": seconds("started_ms"),
        "attempt": int(record.get("attempt") or 0),
        "error": orjson.loads(record["error"]) if record.get("error") else None,
        "usage": usage,
    }


def sample_data(event_type: str, endpoint: str) -> dict[str, Any]:
    """`data` of a message that is sent to try an endpoint out: ids in it stand for nothing."""
    kind = event_type.partition(".")[0]
    if kind == "webhook_endpoint":
        data = {"id": endpoint, "object": "webhook_endpoint"}
        return data | {"reason": "gone"} if event_type.endswith(".disabled") else data
    if kind == "job":
        status = event_type.partition(".")[2]
        return {"id": "job_sample", "object": "job", "status": status, "metadata": {}}
    return {"id": f"{'resp' if kind == 'response' else kind}_sample"}


def id_message(event_id: str, event_type: str, ms: int, object_id: str) -> bytes:
    """As OpenAI tells of batches and responses: their id and nothing else."""
    return message(event_id, event_type, ms, {"id": object_id})


def disabled_message(event: OutboxEvent) -> bytes:
    data = {"id": event.endpoint, "object": "webhook_endpoint", "reason": event.reason}
    return message(event.id, event.type, event.ms, data)
