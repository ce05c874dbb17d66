"""Makes the two files of a batch and ends it with them, in one fenced transaction."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from api.accounts.files import StoredFile
from api.batches.claimed import ClaimedBatch, LeaseLostError
from api.batches.results import Merged, forget
from api.files.ids import result_file_id


async def finish(claimed: ClaimedBatch) -> str:
    """The status it ended in. Raises `LeaseLostError`; then nothing was written."""
    batch, tools = claimed.batch, claimed.tools
    await claimed.results.flush()
    if not await claimed.sql(lambda: tools.records.finalizing(batch, now=datetime.now(UTC))):
        raise LeaseLostError
    store = tools.library.store
    merged = await asyncio.to_thread(claimed.results.merge, store)
    try:
        status = await _end(claimed, merged)
    finally:
        for draft in (merged.output, merged.errors):
            await asyncio.to_thread(store.discard, draft)
    await asyncio.to_thread(forget, tools.folder / batch.id)
    return status


async def _end(claimed: ClaimedBatch, merged: Merged) -> str:
    batch, tools = claimed.batch, claimed.tools
    now = datetime.now(UTC)
    expires_at = now + timedelta(seconds=batch.output_ttl_s) if batch.output_ttl_s else None
    files: list[StoredFile | None] = []
    for kind, draft, size in (
        ("output", merged.output, merged.output_bytes),
        ("error", merged.errors, merged.errors_bytes),
    ):
        if not size:
            files.append(None)
            continue
        file = StoredFile(
            id=result_file_id(batch.id, kind),
            tenant=batch.tenant,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=size,
            created_at=now,
            expires_at=expires_at,
        )
        await asyncio.to_thread(tools.library.store.keep, draft, file.id)
        files.append(file)
    done = "expired" if claimed.stop_code == "batch_expired" else "completed"
    wanted = "cancelled" if claimed.stop_code == "batch_cancelled" else done
    status = await claimed.sql(
        lambda: tools.records.finish(
            batch,
            wanted,
            now=now,
            output=files[0],
            errors=files[1],
            completed=merged.completed,
            failed=merged.failed,
            usage=merged.usage,
        )
    )
    if status is None:
        raise LeaseLostError
    return status
