"""Names of files and batches, and of the jobs of a batch's lines.

The job of a line always has the same id, so putting it in twice makes no second one.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from broker.jobs import new_job_id

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
#: Letters of an id after its prefix, the first 10 of them time.
_LENGTH: Final = 26
_TIME: Final = 10


def new_file_id() -> str:
    return "file-" + new_job_id().removeprefix("job_")


def new_batch_id() -> str:
    return "batch_" + new_job_id().removeprefix("job_")


def line_job_id(batch_id: str, line: int) -> str:
    """Sorts with the jobs of the batch's time, as all ids of jobs do."""
    return "job_" + _derived(batch_id, f"line:{line}")


def result_file_id(batch_id: str, kind: str) -> str:
    """Of a batch's `output` or `errors`: the same however often it is finished."""
    return "file-" + _derived(batch_id, kind)


def _derived(batch_id: str, what: str) -> str:
    number = int.from_bytes(blake2b(f"{batch_id}:{what}".encode(), digest_size=16).digest())
    letters = _LENGTH - _TIME
    rest = "".join(_ALPHABET[(number >> 5 * place) & 31] for place in range(letters))
    return batch_id.removeprefix("batch_")[:_TIME] + rest
