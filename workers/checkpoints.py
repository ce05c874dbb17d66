"""What is taken as a checkpoint, and whether one is still what it was when it was taken.

Weights are safetensors: pickled ones run code when they are read. A checkpoint that brings code of
its own is not taken either. A folder of the model cache holds the digests of its files, made when
they were fetched and checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from config.catalogue import ModelSpec

#: Digests of a folder's files, in the folder.
MANIFEST = ".forebay.json"
#: Endings of weights that are pickles, or hold some.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SourceError(Exception):
    """A model can't be had; the message is one line, fit to be printed."""


def examine(spec: ModelSpec, folder: Path) -> None:
    """Raises `SourceError` unless the folder is a checkpoint that may be loaded."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(
                f"{spec.name}: {folder} is a LoRA adapter; merge it into its model and give that"
            )
        raise SourceError(f"{spec.name}: {folder} has no config.json")
    refuse_pickles(spec, [path.name for path in folder.iterdir()])
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and "auto_map" in content:
            raise SourceError(f"{spec.name}: {path.name} asks for code of its own (auto_map)")


def refuse_pickles(spec: ModelSpec, names: list[str]) -> None:
    """Raises `SourceError` unless there are safetensors among a folder's files."""
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        raise SourceError(
            f"{spec.name}: its weights are pickled ({pickled[0]}), which can run code when read; "
            "only safetensors are taken"
        )
    raise SourceError(f"{spec.name}: has no safetensors weights")


def check_digest(spec: ModelSpec, weights: Path, expected: str) -> None:
    """Raises `SourceError` unless the file has this SHA-256."""
    if not weights.is_file():
        raise SourceError(f"{spec.name}: {weights.name} is missing")
    found = sha256(weights)
    if found != expected:
        raise SourceError(
            f"{spec.name}: SHA-256 of {weights.name} is {found}, it should be {expected}"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Keep the digests of the folder's files in it."""
    digests = {name: sha256(folder / name) for name in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")


def verify(spec: ModelSpec, folder: Path) -> list[str]:
    """What is wrong with a checkpoint that is here, a line each; nothing when all is well.

    A folder that is used where it lies is held to the catalogue's digest, if it has one; one of
    the model cache to those it was made with.
    """
    try:
        examine(spec, folder)
        if spec.source.startswith("path:") and not spec.is_gguf:
            if spec.sha256:
                check_digest(spec, folder / (spec.file or "model.safetensors"), spec.sha256)
            return []
    except SourceError as error:
        return [str(error)]
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return [f"{spec.name}: the digests of {folder} can't be read: remove it and pull again"]
    problems = [
        f"{spec.name}: {name} was not there when the model was fetched"
        for name in _files(folder)
        if name not in digests
    ]
    for name, expected in digests.items():
        try:
            check_digest(spec, folder / name, expected)
        except SourceError as error:
            problems.append(str(error))
    return problems


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield str(path.relative_to(folder))
