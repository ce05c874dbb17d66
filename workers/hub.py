"""Checkpoints from the Hugging Face hub: one commit, checked file by file against what the hub's
listing of that commit says."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config.catalogue import ModelSpec
from workers.checkpoints import SourceError, check_digest, refuse_pickles

#: Files of a checkpoint; Python and pickles are not even fetched.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
#: Pause between two looks at how much has come (s).
_LOOK_EVERY_S = 0.5


def fetch(spec: ModelSpec, into: Path, report: Callable[[float], None]) -> None:
    """Download the files of the spec's commit into a folder that isn't there yet.

    Raises `SourceError`, for pickled weights before anything is fetched.
    """
    import huggingface_hub

    repository, _, revision = spec.source.removeprefix("hub:").rpartition("@")
    where = f"{repository}@{revision}"
    report(0.0)
    try:
        listing = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True
        )
        if listing.sha != revision:
            # A branch or tag can be called like a commit, and be moved.
            raise SourceError(f"{spec.name}: {where} is no commit")
        files = {file.rfilename: file for file in listing.siblings or ()}
        patterns = (spec.file,) if spec.is_gguf else _WANTED
        wanted = {
            name: file
            for name, file in files.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
        if spec.is_gguf:
            if spec.file not in files:
                raise SourceError(f"{spec.name}: {where} has no {spec.file}")
        else:
            refuse_pickles(spec, list(files))
        total = sum(file.size or 0 for file in wanted.values())
        with _shown(into, total, report):
            huggingface_hub.snapshot_download(
                repository, revision=revision, local_dir=into, allow_patterns=list(patterns)
            )
    except SourceError:
        raise
    except Exception as error:
        # The hub's client lets the errors of its HTTP library through, whichever that is.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{spec.name}: can't fetch {where}: {reason}") from error
    shutil.rmtree(into / ".cache", ignore_errors=True)
    for name, file in wanted.items():
        _check(spec, into / name, file)
    report(1.0)


def _check(spec: ModelSpec, path: Path, listed: Any) -> None:
    """The hub lists large files by SHA-256, and others by git's digest of them."""
    if listed.lfs is not None:
        check_digest(spec, path, listed.lfs.sha256)
        return
    if not path.is_file():
        raise SourceError(f"{spec.name}: {path.name} is missing")
    content = path.read_bytes()
    # What git calls a file by; not a choice of ours.
    found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if found != listed.blob_id:
        raise SourceError(f"{spec.name}: {path.name} is not the file of that commit")


@contextmanager
def _shown(folder: Path, total: int, report: Callable[[float], None]) -> Iterator[None]:
    """Report how much of `total` bytes has come, while the body runs."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_EVERY_S):
            here = 0
            for path in folder.rglob("*"):
                try:
                    here += path.stat().st_size if path.is_file() else 0
                except OSError:
                    # Renamed just now.
                    continue
            report(min(1.0, here / total) if total else 0.0)

    thread = threading.Thread(target=look, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
