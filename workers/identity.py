"""Tells one model from another by all that its answers depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from config.catalogue import ModelSpec
from config.settings import Settings
from workers.sources import cached_folder

#: Where and how fast a model runs changes nothing in what it says.
_INDIFFERENT = {"description", "keep_answers", "max_batch", "workers", "cpus", "devices"}
_INDIFFERENT |= {"device_memory_mib"}


def fingerprint(spec: ModelSpec, settings: Settings) -> str:
    """Of a model as this worker runs it; its files are here, unless it is simulated.

    A folder that is used where it lies can be changed without a change of its catalogue entry, so
    its files' sizes and times count.
    """
    parts = [spec.model_dump_json(exclude=_INDIFFERENT)]
    if settings.worker.engine == "simulated":
        parts.append("simulated")
    elif (folder := cached_folder(spec, settings.models)) is not None:
        parts.append(folder.name)
        if spec.source.startswith("path:") and not spec.is_gguf:
            parts += _stamps(folder)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stamps(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (found := path.stat())
    ]
