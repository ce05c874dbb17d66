"""What the reference says of files and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from api.reference.call import FORM, Call
from api.schemas import answers as a
from api.schemas import batches, files
from api.schemas import file_answers as f

_LINE: Final = (
    '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": '
    '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Name a river."}]}}\n'
)
_BYTES: Final = "application/octet-stream"

FILES: Final[Mapping[str, Call]] = {
    "POST /v1/files": Call(
        tag="Files",
        summary="Upload a file",
        body=files.UPLOAD_BODY,
        media=FORM,
        answers={200: f.FileObject},
        example={"purpose": "batch", "file": _LINE},
    ),
    "GET /v1/files": Call(
        tag="Files", summary="List files", query=files.FILE_LISTING, answers={200: f.FilePage}
    ),
    "GET /v1/files/{file_id}": Call(
        tag="Files", summary="Get what is known of a file", answers={200: f.FileObject}
    ),
    "DELETE /v1/files/{file_id}": Call(
        tag="Files", summary="Delete a file", answers={200: a.Deleted}
    ),
    "GET /v1/files/{file_id}/content": Call(
        tag="Files",
        summary="Get a file's content",
        answers={200: _BYTES, 206: _BYTES},
        headers=("Range",),
    ),
}

BATCHES: Final[Mapping[str, Call]] = {
    "POST /v1/batches": Call(
        tag="Batches",
        summary="Run the requests of a file",
        body=batches.NEW_BATCH,
        answers={200: f.BatchObject},
        example={
            "input_file_id": "file-01m87078gkaq486xjy5pjqpvmz",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    ),
    "GET /v1/batches": Call(
        tag="Batches",
        summary="List batches",
        query=batches.BATCH_LISTING,
        answers={200: f.BatchPage},
    ),
    "GET /v1/batches/{batch_id}": Call(
        tag="Batches", summary="Get a batch", answers={200: f.BatchObject}
    ),
    "POST /v1/batches/{batch_id}/cancel": Call(
        tag="Batches", summary="Cancel a batch", answers={200: f.BatchObject}
    ),
}
